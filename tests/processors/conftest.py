"""LAVIS must be imported after the plugin, which adapts it."""

import lavis_svp  # noqa: F401
