"""The whole model as a LAVIS model, with its options and checkpoints."""
