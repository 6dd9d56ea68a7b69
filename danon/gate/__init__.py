"""Two commits of an attention beside each other: is one slower, larger, or worse."""
