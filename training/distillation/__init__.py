"""Teachers, their cache, and what a student learns from them."""
