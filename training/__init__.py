"""The training recipe: data, stages, pruning, evaluation and publishing."""
