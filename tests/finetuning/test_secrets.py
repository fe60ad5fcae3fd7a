"""Seeds and noise keys: drawn for every run, repeated by a run that goes on, and found only where they belong."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import random
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors
from seed_spellings import holders, key_of, spellings

from dp_rmt.finetuning import arms, workdir
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.sweep import executors, report
from dp_rmt.finetuning.sweep.executors import Slot
from dp_rmt.finetuning.sweep.jobs import load_sweep
from dp_rmt.training import prepare
from dp_rmt.training.metrics import read_metrics

MakeConfig = Callable[..., Settings]
UNSET: dict[str, Any] = {"privacy.sampling_seed": None, "privacy.noise_seed": None}


MARKS = {"name": "unmistakable_name", "privacy.l2_clip_norm": 0.12345671, "train.learning_rate": 4.5671238e-4}
LORA = {"model.tuning": "lora", "model.trainable": ".*", "model.lora.rank": 4}


@pytest.fixture(autouse=True, scope="module")
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def run(config: Settings, folder: Path, *, until: int | None = None) -> None:
    prepared = arms.prepare(config, folder)
    for arm in prepared:
        arms.train(arm, until=until)
    arms.report(folder)


@dataclasses.dataclass(frozen=True)
class Runs:
    """Two runs of the same seeds.

    Attributes:
      resumed: whose seeds were drawn, by a process that stopped after two updates of three; another went on.
      whole: to which the same were given.
      drawn: by the first process and then by the second, each for sampling and for noise.
      config: of the first.
    """

    resumed: Path
    whole: Path
    drawn: list[int]
    config: Settings


@pytest.fixture(scope="module")
def runs(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder, rng = tmp_path_factory.mktemp("runs"), random.Random(18)
    drawn = [rng.getrandbits(127) | 1 << 127 for _ in range(4)]
    config = make_config(LORA | MARKS | UNSET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "fresh_seed", functools.partial(next, iter(drawn)))
        run(config, folder / "resumed", until=2)
        run(config, folder / "resumed")
    given = {"privacy.sampling_seed": drawn[0], "privacy.noise_seed": drawn[1]}
    run(make_config(LORA | MARKS | given), folder / "whole")
    return Runs(folder / "resumed", folder / "whole", drawn, config)


@pytest.mark.slow
def test_a_run_of_drawn_seeds_goes_on_with_them(runs: Runs) -> None:
    """The second process draws others, which it must not use: neither for the samples nor for the noise."""
    lines, expected = (
        [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(folder / "metrics.jsonl")]
        for folder in (runs.resumed, runs.whole)
    )
    assert lines == expected
    tensors, others = (read_tensors(folder / "model" / "model.safetensors") for folder in (runs.resumed, runs.whole))
    assert tensors.keys() == others.keys()
    assert all(np.array_equal(tensors[name], others[name]) for name in tensors)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    with safetensors.safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)


@pytest.mark.slow
def test_seeds_that_are_left_out_are_drawn_for_every_run_and_arm(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config({**UNSET, "seed": 123, "arms": {"a": {}, "b": {}}})
    built = [arm.run for number in range(2) for arm in arms.prepare(config, tmp_path / f"run{number}")]
    sampling_seeds = [each.sampling_seed for each in built]
    keys = [np.asarray(each.state.noise.key).tolist() for each in built]
    assert len({*sampling_seeds, config.seed}) == 5
    assert all(2**64 < seed < 2**128 for seed in sampling_seeds)  # but for one in 2^64
    known = [key_of(seed) for seed in (config.seed, *sampling_seeds)]
    known.append(np.asarray(jax.random.key_data(jax.random.key(config.seed))).tolist())
    assert len({tuple(key) for key in keys + known}) == len(keys) + len(known)
    samples = {each.loop.mechanism.sampling(each.sampling_seed).indices(0).tobytes() for each in built}
    assert len(samples) == 4


# ---- What a run leaves ----------------------------------------------------------------------------------------------


def test_the_scan_finds_every_spelling(tmp_path: Path) -> None:
    seed, other = random.Random(1).getrandbits(128), random.Random(2).getrandbits(128)
    for number, spelling in enumerate(spellings(seed)):
        (tmp_path / str(number)).write_bytes(b"before" + spelling + b"after")
    assert holders(tmp_path, [seed]) == {str(number) for number in range(len(spellings(seed)))}
    assert holders(tmp_path, [other]) == set()


@pytest.mark.thorough
@pytest.mark.parametrize("are_given", [False, True])
def test_seeds_and_keys_stand_in_checkpoints_alone_and_in_a_config_that_gives_them(are_given: bool, runs: Runs) -> None:
    folder = runs.whole if are_given else runs.resumed
    found = holders(folder, runs.drawn)
    assert any(name.startswith("checkpoints/") for name in found)
    assert {name for name in found if not name.startswith("checkpoints/")} == ({"config.json"} if are_given else set())
    assert stat.S_IMODE((folder / "checkpoints").stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "config.json").stat().st_mode) == (0o600 if are_given else 0o644)
    assert stat.S_IMODE((folder / "model" / "model.safetensors").stat().st_mode) == 0o644  # what is to be released


@pytest.mark.thorough
def test_a_model_is_released_without_the_config_of_its_run(runs: Runs) -> None:
    """The card says what was chosen for training; names, paths and the layout of the settings stay here."""
    folder, config = runs.resumed, runs.config
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"}
    for kind, own in (
        ("adapter", {"adapter_config.json", "adapter_model.safetensors", "README.md"}),
        ("model", {"config.json", "model.safetensors", "README.md"}),
    ):
        names = {path.name for path in (folder / kind).iterdir()}
        assert own <= names <= own | tokenizer
    keys = [f'"{key}"' for group in (config.privacy, config.train, config.data) for key in group.as_dict()]
    traces = [*keys, MARKS["name"], str(config.data.path), str(config.model.path), str(folder)]
    for path in itertools.chain(*((folder / name).iterdir() for name in ("model", "adapter"))):
        content = path.read_bytes()
        assert [trace for trace in traces if trace.encode() in content] == [], path
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        with safetensors.safe_open(folder / name, "numpy") as file:
            assert file.metadata() == {"format": "pt", "producer": "dp_rmt"}


# ---- Where seeds are given ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "mode"),
    [
        (UNSET, 0o644),
        (UNSET | {"privacy.sampling_seed": 0}, 0o600),
        (UNSET | {"privacy.noise_seed": 7}, 0o600),
        (UNSET | {"arms": {"a": {}, "b": {"privacy": {"noise_seed": 7}}}}, 0o600),
    ],
)
def test_a_config_that_gives_seeds_is_closed_to_others(
    changes: dict[str, Any], mode: int, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(changes)
    workdir.claim_workdir(tmp_path / "run", config)
    path = tmp_path / "run" / "config.json"
    assert stat.S_IMODE(path.stat().st_mode) == mode
    path.chmod(0o644)  # as earlier versions wrote it
    workdir.claim_workdir(tmp_path / "run", config)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


SWEEP = """
BASE, SCORE, SWEPT = "configs/quickstart.py", "eval/dev/accuracy", "train.learning_rate"

def sweep():
    for number in range(4):
        seeds = {"privacy.sampling_seed": 30303030303030 + number, "privacy.noise_seed": 40404040404040 + number}
        yield f"job{number}", {SWEPT: 1e-3, **seeds}
"""


def test_a_sweep_shows_no_seed(tmp_path: Path, statement: dict[str, Any]) -> None:
    (tmp_path / "rates.py").write_text(SWEEP)
    folder = tmp_path / "work"
    of = load_sweep(tmp_path / "rates.py", folder)
    jobs = [
        dataclasses.replace(job, command=("true", *job.command))
        for job in of.jobs(folder, ("python", "-m", "experiments.finetune"))
    ]
    assert any("noise_seed=40404040404040" in word for word in jobs[0].command)
    executors.run_local(jobs, [Slot({})], poll_seconds=0.02)
    for job in jobs:
        job.workdir.mkdir(parents=True)
        (job.workdir / "config.json").write_text(json.dumps(workdir.as_json(of.settings(job.name)) | {"arms": {}}))
        (job.workdir / "privacy.json").write_text(json.dumps(statement))
        (job.workdir / "metrics.jsonl").write_text('{"step": 4, "eval/dev/accuracy": 0.5}\n')
    report.write(of, folder, jobs, {})
    shown = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("config.json", "jobs.json")]
    assert {path.name for path in shown} >= {"sweep.md", "sweep.csv", "sweep.json", "sweep.svg", "job0.log"}
    for path in shown:
        assert not any(seed in path.read_text() for seed in ("30303030303", "40404040404")), path
    (tmp_path / "seeds.py").write_text(SWEEP.replace('"train.learning_rate"', '"privacy.noise_seed"'))
    with pytest.raises(ValueError, match=r"SWEPT is 'privacy.noise_seed', whose values would stand in table and plot"):
        load_sweep(tmp_path / "seeds.py", tmp_path / "other")
