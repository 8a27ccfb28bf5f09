"""mteb tasks over local files."""
