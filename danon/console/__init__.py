"""Messages, reasons and signals of the commands."""
