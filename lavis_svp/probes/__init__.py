"""Probes of a trained model: what its tokens know, what SSPE is worth, where points are lost, and the no-target fit.

The command is ``lavis-svp probe``. Probes need scikit-learn (the extra ``probes`` of ``setup.py``).
"""
