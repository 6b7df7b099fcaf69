"""The one place that touches LAVIS's innards and the names that moved inside transformers.

LAVIS 1.0.2 (March 2023) was never meant for plugins, for a CPU, or for today's transformers. What is mended here:

* before LAVIS is imported (``transformers_names``): names that transformers moved are put back where LAVIS looks;
  OpenCV is loaded before decord, which would give it a zlib that cannot read PNG files (``runtime``);
* after it: unknown names list the known ones, the zoos show every registered name (``names``); LAVIS's own text models
  generate again (``transformers_names``); its runners run on a CPU and without a process group, a second runner in
  one process works, and relative output folders lie in the current directory, not in site-packages (``runtime``);
  they ask the model for its learning rates and mix data sets by ratio, as LAVIS's main branch does (``runners``);
* then the plugin is registered (``hook``).
"""

from lavis_svp.compat.hook import INSTALL_LAVIS, ROOMS_ON_LAVIS, install

__all__ = ["INSTALL_LAVIS", "ROOMS_ON_LAVIS", "install"]
