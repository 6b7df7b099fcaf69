"""SAM's automatic masks as superpixels: prompts -> decoder -> mask filter -> label map; generator.py runs them."""
