"""Superpixels read off SAM's embedding in one pass: boundary head, watershed, nested regions."""
