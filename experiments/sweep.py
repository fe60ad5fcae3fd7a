"""Sweeps: many runs of the main job on this machine, on Slurm or in the cloud, with one table and one plot.

    python -m experiments.sweep --sweep=configs/sweeps/quickstart_rates.py --executor=local --workdir=runs/rates
    python -m experiments.sweep --sweep=... --executor=submitit --launch=slurm_partition=gpu --launch=gpus_per_node=8
    python -m experiments.sweep --sweep=... --executor=print --target=gcloud --launch=tpu=NAME --launch=zone=ZONE

A job is `experiments.finetune` in a process and a folder of its own. The same command again runs the jobs that are
missing or have failed; a run that was killed resumes from its last checkpoint. Further settings, such as
--config.data.path=DIR, hold for all jobs. The exit status is 1 if a job is not finished.
`dp_rmt.finetuning.sweep.jobs.load_sweep` says what a file of configs/sweeps/ contains. `dp-rmt sweep`, which is
installed with the library, is the same program.
"""

from __future__ import annotations

import sys

from dp_rmt.finetuning import console

if __name__ == "__main__":
    console.sweep(sys.argv, ("-m", "experiments.finetune"))
