"""Synthetic tasks, one file each.

Nothing here imports torch before examples are drawn: tables of recorded runs read the titles.
"""
