"""From the state that predicts [SEG] to a mask: read-out, SAM mask decoder, losses, and optional training aids."""
