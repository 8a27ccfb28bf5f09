"""Smaller models from larger ones: what matters, what stays, the cut, and the vocabulary."""
