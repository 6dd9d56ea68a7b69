"""The bench command: runs the suites in a process of their own, and keeps what they measure."""
