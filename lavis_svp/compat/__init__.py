"""The one place that touches LAVIS's innards and the names that moved inside transformers.

``patches`` makes LAVIS 1.0.2 work as a host of plugins, on a CPU and with today's transformers; ``hook`` applies the
patches around LAVIS's import, whoever imports it, and then registers this plugin.
"""

from lavis_svp.compat.hook import INSTALL_LAVIS, install

__all__ = ["INSTALL_LAVIS", "install"]
