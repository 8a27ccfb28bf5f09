"""Hard negatives, found by any SentenceTransformer."""
