"""Small helpers that every folder may use: name registries, checked options, cache paths."""
