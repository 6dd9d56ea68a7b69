"""Kernels that a branch of attention can run on."""
