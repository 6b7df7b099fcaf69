"""Hosts: LAVIS's own BLIP-2, with any registered projector in place of its Q-Former and ``opt_proj`` / ``t5_proj``."""

from lavis_svp.hosts.blip2.models import swap_blip2

__all__ = ["swap_blip2"]
