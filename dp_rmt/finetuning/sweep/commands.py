"""The jobs of a sweep as shell commands for TPU slices (gcloud), xpk and SkyPilot, for the user to run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from dp_rmt.finetuning.sweep.executors import ONE_OF_MANY
from dp_rmt.finetuning.sweep.jobs import Job

TARGETS: dict[str, tuple[str, ...]] = {
    "gcloud": ("tpu", "zone", "project", "directory"),
    "xpk": ("cluster", "device_type", "num_slices", "docker_image", "zone", "project", "directory"),
    "skypilot": ("gpus", "num_nodes", "workdir"),
}
"""Launchers whose commands are printed, and the options that each takes."""

_NEEDED = {"gcloud": ("tpu", "zone"), "xpk": ("cluster", "device_type", "docker_image"), "skypilot": ("gpus",)}
# These are SkyPilot's own variables; each node has one process.
_SKYPILOT_PROCESSES = (
    ' --coordinator_address="$(head -n1 <<< "$SKYPILOT_NODE_IPS"):8476"'
    ' --num_processes="$SKYPILOT_NUM_NODES" --process_id="$SKYPILOT_NODE_RANK"'
)


def printed(jobs: Sequence[Job], target: str, options: Mapping[str, Any]) -> list[str]:
    """A shell command for each job.

    Args:
      jobs: jobs whose workdirs are on a file system that all machines of the target share.
      target: a key of `TARGETS`.
      options: options of the target. ``directory`` is the checkout on the machines; SkyPilot's ``workdir`` is the
        checkout here, which it copies to them.

    Raises:
      ValueError: an option is missing or unknown.

    >>> from pathlib import Path
    >>> job = Job("lr1", ["python", "-m", "experiments.finetune"], Path("w"), Path("l"))
    >>> print(*printed([job], "gcloud", {"tpu": "pod", "zone": "z1"}))  # doctest: +NORMALIZE_WHITESPACE
    gcloud compute tpus tpu-vm ssh pod --zone=z1 --worker=all
    '--command=cd dp_rmt && python -m experiments.finetune --coordinator_address=auto'
    """
    for name in _NEEDED[target]:
        if name not in options:
            raise ValueError(f"--target={target} needs --launch={name}=...; it takes {', '.join(TARGETS[target])}")
    if unknown := sorted(set(options) - set(TARGETS[target])):
        raise ValueError(f"--launch={unknown[0]}=...: {target} takes {', '.join(TARGETS[target])}")
    return [shlex.join(_launcher(target, job, options)) for job in jobs]


def _launcher(target: str, job: Job, options: Mapping[str, Any]) -> list[str]:
    given = {key: f"--{key.replace('_', '-')}={value}" for key, value in options.items() if key != "directory"}
    name = job.name.lower().replace("_", "-").replace(".", "-")  # Kubernetes allows no more
    if target == "skypilot":
        run = shlex.join(job.command) + _SKYPILOT_PROCESSES * (int(options.get("num_nodes", 1)) > 1)
        # A managed job, which SkyPilot starts again elsewhere after a preemption.
        given = {"workdir": "--workdir=.", **given}
        return ["sky", "jobs", "launch", "--yes", "--detach-run", f"--name={name}", *given.values(), run]
    script = f"cd {shlex.quote(options.get('directory', 'dp_rmt'))} && {shlex.join([*job.command, ONE_OF_MANY])}"
    if target == "xpk":
        given = {"num_slices": "--num-slices=1", **given}
        return ["xpk", "workload", "create", f"--workload={name}", *given.values(), f"--command={script}"]
    ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", str(options["tpu"])]
    return [*ssh, *(flag for key, flag in given.items() if key != "tpu"), "--worker=all", f"--command={script}"]
