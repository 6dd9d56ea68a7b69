"""Strategies: how the ranks of a training share a model. A file here is a strategy."""
