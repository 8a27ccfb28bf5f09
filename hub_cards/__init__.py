"""Templates of model and dataset cards, and their rendering."""
