"""Comparison of attentions between two commits: is one slower, larger or worse."""
