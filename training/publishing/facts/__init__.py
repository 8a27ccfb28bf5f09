"""What the cards say, as plain data: read from a release's record and evaluation alone."""
