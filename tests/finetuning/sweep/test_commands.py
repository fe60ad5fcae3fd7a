"""The commands that are printed for others to run."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from dp_rmt.finetuning.sweep import commands
from dp_rmt.finetuning.sweep.jobs import Job


def test_printed_commands_are_what_a_shell_takes_apart_into_the_job() -> None:
    job = Job("lr0.1_A", ("python", "-m", "experiments.finetune", "--config=a b.py"), Path("w"), Path("l"))
    run = "python -m experiments.finetune '--config=a b.py'"
    tpu = {"tpu": "pod", "zone": "us-west4-a", "directory": "src/dp_rmt"}
    (line,) = commands.printed([job], "gcloud", tpu)
    assert shlex.split(line) == [
        "gcloud",
        "compute",
        "tpus",
        "tpu-vm",
        "ssh",
        "pod",
        "--zone=us-west4-a",
        "--worker=all",
        f"--command=cd src/dp_rmt && {run} --coordinator_address=auto",
    ]
    cluster = {"cluster": "c", "device_type": "v5litepod-256", "docker_image": "i"}
    (line,) = commands.printed([job], "xpk", cluster)
    assert shlex.split(line) == [
        "xpk",
        "workload",
        "create",
        "--workload=lr0-1-a",
        "--num-slices=1",
        "--cluster=c",
        "--device-type=v5litepod-256",
        "--docker-image=i",
        f"--command=cd dp_rmt && {run} --coordinator_address=auto",
    ]
    (line,) = commands.printed([job], "skypilot", {"gpus": "H100:8"})
    assert shlex.split(line) == [
        "sky",
        "jobs",
        "launch",
        "--yes",
        "--detach-run",
        "--name=lr0-1-a",
        "--workdir=.",
        "--gpus=H100:8",
        run,
    ]
    (line,) = commands.printed([job], "skypilot", {"gpus": "H100:8", "num_nodes": 2})
    (*_, script) = shlex.split(line)
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    printing = ["bash", "-c", script.replace("python -m", "printf '%s\\n'", 1)]
    shown = subprocess.run(printing, env={**os.environ, **nodes}, capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-3:] == [
        "--coordinator_address=10.0.0.1:8476",
        "--num_processes=2",
        "--process_id=1",
    ]
    with pytest.raises(ValueError, match=r"--target=gcloud needs --launch=zone"):
        commands.printed([job], "gcloud", {"tpu": "pod"})
    with pytest.raises(ValueError, match=r"--launch=tpus=\.\.\.: gcloud takes tpu"):
        commands.printed([job], "gcloud", {**tpu, "tpus": 1})
