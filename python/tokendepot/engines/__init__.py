"""Edges of the depot to inference engines; each is a package of its own that imports its engine and no other one's.

`metrics` is the table of what each of them exports.
"""
