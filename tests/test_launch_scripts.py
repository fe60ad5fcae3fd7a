"""The scripts that start runs, with stand-ins for what they call: what they would start, and what follows its end."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

import experiments

SCRIPTS = Path(experiments.__file__).parents[1] / "scripts"
JOB = ["configs/a b.py", "work dir", "--config.mesh.fsdp=-1"]
FINETUNE = ["-m", "experiments.finetune", "--config=configs/a b.py", "--workdir=work dir"]


@pytest.fixture
def run(tmp_path):
    """``(script, *arguments, status of the stand-ins by name, **variables) -> (exit status, [what was called])``."""
    tools, calls = tmp_path / "tools", tmp_path / "calls"
    tools.mkdir()

    def start(script, *arguments, tools_status, **variables):
        calls.write_text("")
        for name, status in tools_status.items():
            stand_in = tools / name
            stand_in.write_text(f'#!/bin/sh\nprintf "%s\\0" {name} "$@" >> {calls}\necho >> {calls}\nexit {status}\n')
            stand_in.chmod(0o755)
        environment = {"PATH": f"{tools}:{os.environ['PATH']}", **variables}
        command = ["bash", str(SCRIPTS / script), *arguments]
        ended = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=30)
        return ended.returncode, [line.rstrip("\0").split("\0") for line in calls.read_text().split("\0\n") if line]

    return start


def test_a_gpu_node_runs_one_process(run):
    status, calls = run("launch_gpu_node.sh", *JOB, tools_status={"nvidia-smi": 0, "python": 7})
    assert status == 7
    assert calls[1:] == [["python", *FINETUNE, "--config.mesh.fsdp=-1"]]


def test_without_a_gpu_nothing_is_started(run):
    status, calls = run("launch_gpu_node.sh", *JOB, tools_status={"nvidia-smi": 9, "python": 0})
    assert status == 1
    assert [name for name, *_ in calls] == ["nvidia-smi"]


@pytest.mark.parametrize(
    ("ended", "restarts", "status", "requeued"),
    [(0, 0, 0, False), (1, 0, 1, False), (143, 3, 143, True), (143, 50, 1, False)],
)
def test_slurm_queues_again_what_was_preempted(run, tmp_path, ended, restarts, status, requeued):
    variables = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": str(restarts)}
    tools = {"srun": ended, "scontrol": 0}
    found, (srun, *others) = run("launch_slurm.sh", *JOB, tools_status=tools, **variables)
    assert found == status
    assert srun == ["srun", "--wait=300", "python", *FINETUNE, "--coordinator_address=auto", "--config.mesh.fsdp=-1"]
    assert others == [["scontrol", "requeue", "5"]] * requeued


def test_every_host_of_a_tpu_slice_runs_the_same(run):
    variables = {"TPU": "pod", "ZONE": "us-west4-a"}
    status, (call,) = run("launch_tpu_pod.sh", "run", *JOB, tools_status={"gcloud": 0}, **variables)
    assert status == 0
    assert call[:-1] == ["gcloud", *["compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=us-west4-a", "--worker=all"]]
    words = shlex.split(call[-1].removeprefix("--command="))
    assert words[:5] == ["cd", "dp_rmt", "&&", "JAX_PLATFORMS=tpu", ".venv/bin/python"]
    assert words[5:] == [*FINETUNE, "--coordinator_address=auto", "--config.mesh.fsdp=-1"]


@pytest.mark.parametrize("script", ["launch_gpu_node.sh", "launch_slurm.sh", "launch_tpu_pod.sh"])
def test_without_arguments_a_script_says_how_it_is_called(run, tmp_path, script):
    variables = {"TPU": "pod", "ZONE": "z", "SLURM_SUBMIT_DIR": str(tmp_path)}
    tools = dict.fromkeys(("gcloud", "srun", "nvidia-smi", "python"), 0)
    assert run(script, tools_status=tools, **variables) == (2, [])
