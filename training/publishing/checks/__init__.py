"""Checks of a packed folder."""
