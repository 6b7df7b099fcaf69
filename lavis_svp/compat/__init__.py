"""The one place that touches LAVIS's innards and the names that moved inside transformers.

LAVIS 1.0.2 (March 2023) was not written for plugins, for a CPU, or for today's transformers. What is patched:

* before LAVIS is imported: names that transformers moved are put back where LAVIS looks (``transformers_names``);
  OpenCV is loaded before decord, which would give it a zlib that cannot read PNG files (``lavis_patches``);
* after it: unknown names raise errors that list the known ones, and the zoos show every registered name; LAVIS's
  runners run on a CPU and without a process group, a second runner in one process works, and relative output folders
  lie in the current directory, not in site-packages (``lavis_patches``); LAVIS's own text models generate again
  (``transformers_names``);
* then the plugin is registered (``hook``).
"""

from lavis_svp.compat.hook import INSTALL_LAVIS, install

__all__ = ["INSTALL_LAVIS", "install"]
