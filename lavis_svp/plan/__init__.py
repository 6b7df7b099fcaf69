"""What a training run will take, told from its YAML without weights: parameters, operations, memory, time.

The command: ``python -m lavis_svp.plan --cfg-path FILE.yaml``; see ``docs/plan.md``.
"""
