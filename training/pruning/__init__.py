"""Cut a model to a smaller shape and vocabulary."""
