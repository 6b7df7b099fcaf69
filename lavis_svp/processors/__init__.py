"""LAVIS processors: ``image`` (the tensor for the encoders), ``superpixel`` (its regions), ``text`` (the sentence)."""
