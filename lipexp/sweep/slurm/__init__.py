"""The stacks of a sweep as SLURM jobs, submitted through submitit.

Stacks are submitted together, as one job array, with their composed configurations: what is edited while they
queue changes nothing. Results come back as run folders, over the file system that the machines share. The folder
`slurm` of the sweep holds the rest:

    submitted.json         what was submitted: SLURM's number of each stack, and its jobs (submitted.py)
    17_2_progress.json     how far the stack is that is SLURM job 17_2
    17_2_*                 submitit's files, among them the log (.out and .err)
"""

from __future__ import annotations

from lipexp.sweep.slurm.cluster import Cluster, check_machine, refuse_second

__all__ = ["Cluster", "check_machine", "refuse_second"]
