"""The names, for whoever must not import what they stand for."""

PREFIX = "eff:"

MECHANISM_NAMES = ("block_sparse", "lsh", "neighborhood", "nystrom", "performer", "sliding_window")
"""Rows of `mechanisms.MECHANISMS`; `PREFIX` and a name are an `attn_implementation`."""
