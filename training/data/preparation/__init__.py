"""Preparation of one source in phases of tasks: read, tokenise, place, assemble."""
