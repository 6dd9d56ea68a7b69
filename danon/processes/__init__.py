"""Child processes, and the lines between them and the command."""
