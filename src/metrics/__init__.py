"""Metrics, one file each: a pure function and a thin class that asks for what it needs. Feature extractors are objects."""
