"""Launchers: one plan of a job as data, run on this machine, by SLURM or by NeMo-Run. `plan` needs Python alone."""
