"""Kinds of study, one file each: a module here is a ``--kind`` of ``danon tune``."""
