"""The frozen half of the model: image encoders, image geometry, and the feature extractor with its cache.

- ``types``: what leaves this folder (patch features), with torch and numpy alone.
- ``backbone``, ``families``: the vision transformer that makes patch features (DINOv2, CLIP, SigLIP, ...).
- ``sam``, ``tinyvit``: SAM in its three parts, from any published checkpoint.
- ``geometry``: where an image lies in SAM's square input, and the way there and back.
- ``feature_extractor``, ``extra_channels``: both encoders and the superpixels behind one call.
- ``feature_cache``: its outputs on disk, computed once before training.
- ``sam_superpixels``: SAM superpixels straight from an image, without a model around them.
"""
