"""lavis-svp: semantic superpixels as the visual tokens of a multimodal LLM, as a plugin for salesforce-lavis.

``import lavis_svp`` is cheap: it imports neither torch nor LAVIS. It makes the next ``import lavis`` (any module of
it) register this plugin's models, processors, datasets, tasks and runners, so that afterwards LAVIS's own
``load_model_and_preprocess``, ``load_dataset``, ``model_zoo`` and registry know them. If LAVIS is imported already,
they are registered at once.
"""

from __future__ import annotations

from lavis_svp import compat

__version__ = "0.6.0"

compat.install()
