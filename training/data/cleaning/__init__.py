"""Duplicates and leaked evaluation texts: found, reported and removed."""
