"""SAM's automatic masks as superpixels: options and presets, decoder, prompts, tests, choice, painting, granularity."""
