"""Training data: from sources to the published format, and from there to prepared tokens."""
