"""Tables, terminal, HTML and charts made of recorded results."""
