"""Synthetic tasks, one question and one right answer each."""
