"""What is checked in a packed folder, one concern a file."""
