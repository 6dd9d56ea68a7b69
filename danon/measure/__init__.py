"""Instruments: time, memory, correctness, and the state of the machine and the process."""
