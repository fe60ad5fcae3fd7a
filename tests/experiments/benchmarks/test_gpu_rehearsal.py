"""gpu.sh rehearsed as a user does it, with models and data of a few kilobytes; and the flags of every job."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import experiments
from experiments.benchmarks.gpu.jobs import PARTS, Places, all_jobs

ROOT = Path(experiments.__file__).parents[1]
ROW = '"name[Blue Spice], eatType[pub], near[Rose {n}]","Blue Spice is a pub near Rose {n} ."\n'


@pytest.fixture(scope="module")
def places(
    tmp_path_factory: pytest.TempPathFactory, corpus: Path, model: Path, make_llama: Callable[..., Path]
) -> Path:
    """A folder with models and data, as beside the project of a bundle."""
    folder = tmp_path_factory.mktemp("unpacked")
    shutil.copytree(model, folder / "models" / "minilm")
    words = "name Type near : | Blue Spice pub Rose is a . " + " ".join(map(str, range(80)))
    made = make_llama(tmp_path_factory.mktemp("llama"), words, max_length=192)
    shutil.copytree(made, folder / "models" / "stories260k")
    shutil.copytree(corpus, folder / "data" / "sst2")
    (folder / "data" / "e2e").mkdir()
    for name, count in (("trainset", 80), ("devset", 8), ("testset_w_refs", 8)):
        rows = "".join(ROW.format(n=number) for number in range(count))
        (folder / "data" / "e2e" / f"{name}.csv").write_text("mr,ref\n" + rows)
    return folder


def rehearsed(places: Path, results: Path, *more: str) -> str:
    """What one call prints that leaves nothing."""
    options = [f"--models={places / 'models'}", f"--data={places / 'data'}", f"--results={results}", "--minutes=30"]
    command = ["bash", str(ROOT / "experiments" / "benchmarks" / "gpu.sh"), "--rehearse", *options, *more]
    environment = {**os.environ, "PYTHON": sys.executable}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.thorough
def test_the_cheapest_jobs_are_rehearsed_and_not_done_twice(places: Path, tmp_path: Path) -> None:
    """Of three parts; the others take minutes."""
    names = ("a/laws", "c/tiny", "e/decoding_2")
    printed = rehearsed(places, tmp_path, f"--parts={','.join(names)}")
    assert "3 of 3 jobs have ended" in printed
    (folder,) = tmp_path.iterdir()
    parts = {path.name: path.read_bytes() for path in folder.glob("*.json")}
    jobs = {name: job for text in parts.values() for name, job in json.loads(text)["jobs"].items()}
    assert sorted(jobs) == sorted(names)
    assert all((job["status"], bool(job["records"])) == ("done", True) for job in jobs.values())
    assert jobs["a/laws"]["records"]["laws.json"]["counts"] == {"passed": 4}
    rehearsed(places, tmp_path, f"--parts={','.join(names)}")
    assert {path.name: path.read_bytes() for path in folder.glob("*.json")} == parts


@pytest.mark.slow
def test_every_part_is_rehearsed(places: Path, tmp_path: Path) -> None:
    printed = rehearsed(places, tmp_path)
    (folder,) = tmp_path.iterdir()
    jobs: dict[str, Any] = {}
    for letter, name in PARTS.items():
        text = (folder / f"{letter}_{name}.json").read_text()
        assert not re.search(r"(?<![\w.])/(tmp|home|root|usr|work|opt)/", text)
        part = json.loads(text)
        assert part["machine"]["device_kind"] == "cpu"
        assert part["rehearsal"] is True
        jobs |= part["jobs"]
    for name, job in jobs.items():
        if job["status"] == "skipped":
            assert f"{name}: skipped, {job['reason']}" in printed
            assert job["reason"] in ("jax_privacy not installed", "torch not installed")
        else:
            assert (job["status"], bool(job["records"])) == ("done", True), (name, job)
    assert jobs["a/against_cpu"]["records"]["against_cpu.json"]["passed"]
    assert jobs["a/laws"]["records"]["laws.json"]["counts"] == {"passed": 4}


PARSE = """
import importlib, json, sys
from absl import flags
sys.argv = [sys.argv[1]]
module = importlib.import_module(sys.argv[0])
for given in json.load(sys.stdin):
    flags.FLAGS.unparse_flags()  # what other calls gave
    flags.FLAGS([sys.argv[0], *given])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        "experiments.benchmarks.step.main",
        "experiments.benchmarks.step.profile",
        "experiments.benchmarks.denoiser",
        "experiments.benchmarks.gpu.against_cpu",
        "experiments.benchmarks.gpu.laws",
        "experiments.studies.methods.study",
    ],
)
def test_every_program_knows_its_flags(module: str, tmp_path: Path) -> None:
    """Those of the real jobs, of which a rehearsal runs others: one process for each program."""
    jobs = all_jobs(Places(tmp_path, tmp_path, "decoder"), rehearse=False)
    calls = [command[2:] for job in jobs for command in job.commands if command[1] == module]
    assert calls
    given = [[argument for argument in call if not argument.startswith("--config")] for call in calls]
    command = [sys.executable, "-c", PARSE, module]
    checked = subprocess.run(command, cwd=ROOT, input=json.dumps(given), capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.slow
def test_every_config_knows_its_keys(tmp_path: Path) -> None:
    from dp_rmt.finetuning import command_line
    from dp_rmt.finetuning.checks import arm_settings

    checked = 0
    for job in all_jobs(Places(tmp_path, tmp_path, "decoder"), rehearse=False):
        for command in job.commands:
            rest, assignments = command_line.split(command)
            files = [argument.removeprefix("--config=") for argument in rest if argument.startswith("--config=")]
            for file in files:
                arm_settings(command_line.read(str(ROOT / file), assignments))
                checked += 1
    assert checked == 8  # two configs at three batch sizes; E2E at two epsilons
