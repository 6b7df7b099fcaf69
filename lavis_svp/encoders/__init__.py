"""Frozen image encoders: patch features from a vision transformer, embeddings and mask parts from SAM."""

from lavis_svp.encoders.sam import SamEncoder, SamParts, build_sam
from lavis_svp.encoders.vision import VisionEncoder, build_vision_encoder

__all__ = ["SamEncoder", "SamParts", "VisionEncoder", "build_sam", "build_vision_encoder"]
