"""Hosts: LAVIS's own BLIP-2, with any registered projector in place of its Q-Former and ``opt_proj`` / ``t5_proj``.

The LAVIS models ``blip2_opt_svp`` and ``blip2_t5_svp``, and :func:`swap_blip2` for a BLIP-2 that is built already.
"""

from lavis_svp.hosts.blip2.swap import swap_blip2

__all__ = ["swap_blip2"]
