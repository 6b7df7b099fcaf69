"""LAVIS runners ``runner_svp`` and ``runner_deepspeed``, and their parts; ``project`` leads from a YAML to a runner."""
