"""LAVIS processors: the image for the encoders, its superpixels, the cleaned expression."""
