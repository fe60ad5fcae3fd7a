"""Sweeps: restarted after a failure by a local pool and by submitit; table, plot, commands."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import dp_rmt
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.sweep import executors, launch, report
from dp_rmt.finetuning.sweep.arm_folders import ArmFolder, spent_by
from dp_rmt.finetuning.sweep.executors import Slot
from dp_rmt.finetuning.sweep.jobs import Job, Sweep, is_finished, load_sweep
from dp_rmt.finetuning.workdir import as_json
from dp_rmt.reporting.provenance import Provenance
from dp_rmt.training.ledger import Entry, Ledger, now

ROOT = Path(dp_rmt.__file__).parents[1]
FINETUNE = ("-m", "experiments.finetune")

RATES, SEEDS = (1e-3, 1e-2), (0, 1, 2)

SWEEP = """
BASE = "configs/quickstart.py"
SCORE = "eval/dev/accuracy"
SWEPT = "train.learning_rate"

def sweep():
    for rate in (1e-3, 1e-2):
        for seed in (0, 1, 2):
            yield f"lr{rate:g}_{seed}", {SWEPT: rate, "seed": seed}
"""

# What a job leaves, by a program that imports nothing of the project. The job "lr0.01_1" fails until `mended` exists.
STUB = """
import json, pathlib, sys, time
folder, config, privacy, mended, fails = pathlib.Path(sys.argv[1]), *sys.argv[2:]
folder.mkdir(parents=True, exist_ok=True)
with (folder.parent / f"{folder.name}.runs").open("a") as file:
    file.write("x")
print("started", folder.name, flush=True)  # before what goes to stderr
if fails == "yes" and not pathlib.Path(mended).exists():
    print("ValueError: the disk is full", file=sys.stderr)
    sys.exit(3)
(folder / "config.json").write_text(config)
(folder / "privacy.json").write_text(privacy)
score = 0.5 + 10 * json.loads(config)["train"]["learning_rate"] + json.loads(config)["seed"] / 100
(folder / "metrics.jsonl").write_text(json.dumps({"step": 4, "eval/dev/accuracy": score}) + chr(10))
(folder / "report.html").write_text("done")
"""


@pytest.fixture
def make_sweep(tmp_path: Path) -> Sweep:
    path = tmp_path / "rates.py"
    path.write_text(SWEEP)
    return load_sweep(path, tmp_path / "work")


def stubs(of: Sweep, workdir: Path, statement: dict[str, Any]) -> list[Job]:
    """The jobs of a sweep, their commands replaced by one that takes a moment."""
    jobs = []
    for job in of.jobs(workdir, (sys.executable, *FINETUNE)):
        config = as_json(of.settings(job.name)) | {"arms": {}}
        config["train"] |= {"num_steps": 4}
        fails = "yes" if job.name == "lr0.01_1" else "no"
        given = (str(job.workdir), json.dumps(config), json.dumps(statement), str(workdir / "mended"), fails)
        jobs.append(dataclasses.replace(job, command=(sys.executable, "-c", STUB, *given)))
    return jobs


def runs_of(jobs: list[Job]) -> dict[str, int]:
    """How often each has been started."""
    return {job.name: len((job.workdir.parent / f"{job.name}.runs").read_text()) for job in jobs}


def by_local(jobs: list[Job], workdir: Path) -> dict[str, str]:
    del workdir
    return executors.run_local(jobs, [Slot({})] * 2, poll_seconds=0.02)


def by_submitit(jobs: list[Job], workdir: Path) -> dict[str, str]:
    options = {"cluster": "local", "timeout_min": 5}
    return executors.run_submitit(jobs, workdir, options, cwd=ROOT)


@pytest.mark.thorough
@pytest.mark.parametrize("executor", [by_local, pytest.param(by_submitit, marks=pytest.mark.slow)])
def test_a_restarted_sweep_runs_what_has_failed_and_nothing_else(
    executor: Callable[[list[Job], Path], Mapping[str, str]],
    make_sweep: Sweep,
    statement: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if executor is by_submitit:
        pytest.importorskip("submitit")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
    jobs = stubs(make_sweep, tmp_path, statement)
    assert not any(is_finished(job) for job in jobs)
    notes = executor(jobs, tmp_path)
    assert [job.name for job in jobs if not is_finished(job)] == ["lr0.01_1"]
    assert set(runs_of(jobs).values()) == {1}
    failed = launch.failures(jobs, notes)
    assert list(failed) == ["lr0.01_1"]
    assert "ValueError: the disk is full\n== exit status 3" in failed["lr0.01_1"]
    text = report.write(make_sweep, tmp_path, [job for job in jobs if is_finished(job)], failed)
    assert "NOT FINISHED: lr0.01_1" in text
    assert "the disk is full" in (tmp_path / "sweep.md").read_text()

    (tmp_path / "mended").touch()
    missing = [job for job in jobs if not is_finished(job)]
    executor(missing, tmp_path)
    assert all(is_finished(job) for job in jobs)
    assert runs_of(jobs) == {job.name: 1 + (job.name == "lr0.01_1") for job in jobs}
    text = report.write(make_sweep, tmp_path, jobs, {})
    assert "NOT FINISHED" not in text
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["job"] for row in rows] == [f"lr{rate:g}_{seed}" for rate in RATES[::-1] for seed in SEEDS[::-1]]
    assert [float(row["eval/dev/accuracy"]) for row in rows] == pytest.approx([0.62, 0.61, 0.6, 0.53, 0.52, 0.51])
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert (len(record["runs"]), record["unfinished"], record["choosing"]["rule"]) == (6, {}, "none")
    page = (tmp_path / "sweep.md").read_text()
    assert "6 of 6 jobs are finished" in page
    assert "| 0.01 | 3 | 0.61 | 0.01 |" in page
    assert "share a noise seed" in page  # the quickstart gives one
    assert "<svg" in (tmp_path / "sweep.svg").read_text()


def test_text_of_configs_and_logs_stays_text_in_the_table(
    make_sweep: Sweep, statement: dict[str, Any], tmp_path: Path
) -> None:
    (job, *_) = stubs(make_sweep, tmp_path, statement)
    by_local([job], tmp_path)
    config = json.loads((job.workdir / "config.json").read_text())
    config["train"]["learning_rate"] = "a|<script>"
    (job.workdir / "config.json").write_text(json.dumps(config))
    report.write(make_sweep, tmp_path, [job], {"other": "```\n<script>alert(1)</script>\n````"})
    page = (tmp_path / "sweep.md").read_text()
    assert "| a\\|&lt;script&gt; |" in page
    assert "\n`````\n```\n<script>alert(1)</script>\n````\n`````\n" in page


def test_a_killed_or_preempted_run_is_not_finished(
    tmp_path: Path, make_sweep: Sweep, statement: dict[str, Any]
) -> None:
    (job, *_) = stubs(make_sweep, tmp_path, statement)
    by_local([job], tmp_path)
    assert is_finished(job)
    (job.workdir / "privacy.json").write_text(json.dumps({**statement, "num_steps": 3}))
    assert not is_finished(job)
    (job.workdir / "privacy.json").write_text(json.dumps({**statement, "is_upper_bound": True}))
    assert not is_finished(job)  # it announced its last update, and was killed before it came to it
    (job.workdir / "privacy.json").write_text(json.dumps(statement))
    (job.workdir / "report.html").unlink()
    assert not is_finished(job)


def test_what_a_run_has_spent_is_what_its_ledger_says(
    tmp_path: Path, make_sweep: Sweep, statement: dict[str, Any]
) -> None:
    """Of a run of an earlier version, without a ledger and perhaps killed, all that it planned."""
    (job, *_) = stubs(make_sweep, tmp_path, statement)
    by_local([job], tmp_path)
    (job.workdir / "privacy.json").write_text(json.dumps({**statement, "num_steps": 0}))
    (run,) = spent_by(job.name, job.workdir)
    assert run.statement["num_steps"] == 4
    entry = Entry(
        run="a" * 32,
        updates=3,
        is_exact=False,
        num_steps=4,
        noise_multiplier=2.0,
        l2_clip_norm=0.1,
        delta=1e-5,
        sampling_probability=0.02,
        max_batch_size=400,
        num_examples=10_000,
        seeds_from="os entropy",
        train_data="ff",
        about=Provenance(),
        date=now(),
    )
    Ledger(job.workdir).append(entry)
    (run,) = spent_by(job.name, job.workdir)
    assert run.statement["num_steps"] == 3
    Ledger(job.workdir).append(dataclasses.replace(entry, updates=0, is_exact=True))
    assert spent_by(job.name, job.workdir) == []


def test_epsilon_and_delta_of_the_table_are_rounded_up() -> None:
    table = report._markdown([{"job": "a", "score": 0.50004, "epsilon": 8.00049, "delta": 1.00001e-5}])
    assert table.splitlines()[-1] == "| a | 0.5 | 8.001 | 1.001e-5 |"


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweeps").glob("*.py")), ids=lambda path: path.stem)
def test_every_sweep_of_the_project_gives_valid_configs(path: Path, tmp_path: Path) -> None:
    loaded = load_sweep(path, tmp_path, ["--config.data.cache_dir=/tmp/elsewhere"])
    assert loaded.changes
    for name, changes in loaded.changes.items():
        config = loaded.settings(name)
        assert config.data.cache_dir == "/tmp/elsewhere"
        for key, value in changes.items():
            assert ArmFolder("", tmp_path, as_json(config), {}).value(key) == value
    for part in ("Source: ", "Expected: ", "Cost: ", "Command: python -m experiments.sweep "):
        assert path.read_text().count(part) == 1, part
    again = load_sweep(path, tmp_path)
    assert again.changes == loaded.changes  # drawn once, where drawn at random


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (SWEEP.replace("SCORE =", "SCOR ="), "lacks SCORE"),
        (SWEEP.replace('f"lr{rate:g}_{seed}"', '"same"'), "same name"),
        (SWEEP.replace('f"lr{rate:g}_{seed}"', 'f"lr/{rate:g}_{seed}"'), "becomes a folder"),
        (SWEEP.replace('f"lr{rate:g}_{seed}"', '"." * int(1e4 * rate + seed)'), r"'\.\.+' becomes a folder"),
    ],
)
def test_a_broken_sweep_is_refused(source: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(source)
    with pytest.raises(ValueError, match=message):
        load_sweep(tmp_path / "broken.py", tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.learning_rat": 1.0}, r"job 'a' .*learning_rat"),
        ({"train.learning_rate": -1.0}, r"job 'a' .*must be above 0"),
    ],
)
def test_a_job_with_a_wrong_setting_is_refused(changes: dict[str, Any], message: str, make_sweep: Sweep) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make_sweep, changes={"a": changes}).settings("a")


# ---- The command, for real ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", "submitit"])
def test_six_real_runs_of_which_one_fails_at_first(
    executor: str, make_config: Callable[..., Settings], tmp_path: Path, compilation_cache_dir: str
) -> None:
    if executor == "submitit":
        pytest.importorskip("submitit")
    config = make_config()
    pairs = {name: getattr(config.data, name) for name in ("path", "cache_dir", "max_length")}
    source = (
        "from configs import base\n\ndef get_config():\n    config = base.get_config().unlock()\n"
        f"    config.name = 'tiny'\n    config.data.update({pairs!r})\n    config.data.length_groups = ()\n"
        f"    config.model.path = {config.model.path!r}\n    config.model.trainable = {config.model.trainable!r}\n"
        "    config.privacy.update({'epsilon': 0.5, 'delta': 1e-3, 'expected_batch_size': 24})\n"
        "    config.denoise = ()\n"
        "    config.train.update({'num_steps': 2, 'microbatch_size': 8, 'eval_batch_size': 32})\n"
        "    return config.lock()\n"
    )
    (tmp_path / "tiny.py").write_text(source)
    # One job reads a model that is not there yet.
    late = tmp_path / "late"
    only_one = f'"seed": seed}} | ({{"model.path": {str(late)!r}}} if (rate, seed) == (1e-2, 1) else {{}})'
    rates = SWEEP.replace("configs/quickstart.py", str(tmp_path / "tiny.py")).replace('"seed": seed}', only_one)
    (tmp_path / "rates.py").write_text(rates)
    options = ["--jobs_at_once=1"] if executor == "local" else ["--launch=cluster=local", "--launch=timeout_min=20"]
    command = [
        sys.executable,
        "-m",
        "experiments.sweep",
        f"--sweep={tmp_path / 'rates.py'}",
        f"--executor={executor}",
        f"--workdir={tmp_path / 'work'}",
        *options,
    ]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": compilation_cache_dir}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900
        )

    first = run()
    assert first.returncode == 1, first.stdout + first.stderr
    assert "6 jobs, 0 finished before, 6 to run" in first.stdout
    assert first.stdout.count("NOT FINISHED") == 1
    assert str(late) in first.stdout  # in the last lines of the log
    late.symlink_to(config.model.path)
    second = run()
    assert second.returncode == 0, second.stdout + second.stderr
    assert "6 jobs, 5 finished before, 1 to run" in second.stdout
    choosing = json.loads((tmp_path / "work" / "sweep.json").read_text())["choosing"]
    assert choosing["rule"] == "composition"
    assert choosing["epsilon"] > 0.5
    third = run()
    assert "6 finished before, 0 to run" in third.stdout
