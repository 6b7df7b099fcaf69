"""LAVIS processors: the picture for the encoders, its superpixels, the cleaned expression."""
