"""The folder that the Hub reads: files, card, plot."""
