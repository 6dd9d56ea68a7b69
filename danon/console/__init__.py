"""Messages, reasons and signals: what every command needs."""
