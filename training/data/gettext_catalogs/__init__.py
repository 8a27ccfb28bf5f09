"""Messages of installed programs as training data."""
