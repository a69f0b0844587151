"""Edges of the depot to inference engines; each is a package of its own that imports its engine and nothing else's."""
