"""The stacks of a sweep as SLURM jobs, submitted through submitit.

Stacks are submitted together, as one job array. Their composed configurations travel with it: what is edited while
it queues changes nothing. Results come back as run folders, over the file system that the machines share; the rest
lies in the folder `slurm` of the sweep:

    submissions.json       what was submitted: a name, SLURM's number, and the jobs of each stack (record.py)
    17_2_progress.json     how far the stack is that is SLURM job 17_2 (task.py)
    17_2_*                 submitit's files: the configurations, and the log (.out and .err)
"""

from __future__ import annotations

from lipexp.sweep.slurm.cluster import Cluster, refuse_second
from lipexp.sweep.slurm.options import SlurmOptions, check_machine

__all__ = ["Cluster", "SlurmOptions", "check_machine", "refuse_second"]
