"""What a training run will take, estimated from its YAML without weights: parameters, operations, memory, time.

The command is ``lavis-svp plan``; see ``docs/plan.md``.
"""
