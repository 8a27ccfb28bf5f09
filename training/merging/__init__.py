"""Averages of models: soups of checkpoints, and models of one architecture merged."""
