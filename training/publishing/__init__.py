"""Models, data and intermediate checkpoints on their way to the Hub: packed, verified, pushed."""
