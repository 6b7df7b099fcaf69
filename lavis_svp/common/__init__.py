"""Small helpers that every room may use: name registries, checked options, cache paths."""
