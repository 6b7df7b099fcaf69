"""LAVIS runners: ``runner_svp``, and what it is made of."""
