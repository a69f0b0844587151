"""Benchmarks and plans that a user runs. Each is imported by its command only: what they need is in the extra `bench`."""
