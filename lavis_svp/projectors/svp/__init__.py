"""The paper's projector (arXiv 2509.13676): ``pooling`` (coarse embeddings), ``sspe``, ``ssa``, ``projector``.

``reference`` has SSPE and SSA written out plainly; docs/svp.md has the formulas.
"""
