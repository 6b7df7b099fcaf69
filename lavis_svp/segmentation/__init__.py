"""From the state that predicts ``[SEG]`` to a mask: the prompt, the mask decoder, the losses, "no such thing"."""
