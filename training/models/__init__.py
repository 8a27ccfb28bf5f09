"""Models: resolving, loading, encoding, adapters, merging and export."""
