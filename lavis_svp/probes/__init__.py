"""Probes of a trained model: what its tokens know, what SSPE is worth, where points are lost. See docs/probes.md."""
