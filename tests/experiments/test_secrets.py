"""Seeds of sampling and noise: from the operating system, kept in checkpoints, and nowhere else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from dp_rmt.noise_addition import noise_key
from dp_rmt.training.train import TrainLoop
from experiments import arms
from experiments.workdir import claim_workdir

MakeConfig = Callable[..., ConfigDict]
SAMPLING_SEED = (0x0123_4567_89AB_CDEF << 64) + 0xFEDC_BA98_7654_3211
NOISE_SEED = (0x1A2B << 112) + 0x3C4D_5E6F_7081_9203
UNSET = {"privacy.sampling_seed": None, "privacy.noise_seed": None}


def noise_words(state: Any) -> list[int]:
    """The words of the noise's key: the first uint32 leaves of its state, or keys."""
    leaves = [jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in state]
    return [int(word) for leaf in leaves if leaf.dtype == np.uint32 for word in np.asarray(leaf).ravel()]


def noise_of(arm: arms.Arm) -> list[int]:
    return noise_words(jax.tree.leaves(arm.run.state.noise))


def run(config: ConfigDict, workdir: Path, until: int | None = None) -> arms.Arm:
    (arm,) = arms.prepare(config, workdir)
    arms.train(arm, until=until)
    arms.report([arm], workdir)
    return arm


def spellings(number: int, size: int) -> set[bytes]:
    """A number as it may stand in a file: decimal, hexadecimal, and its bytes in either order."""
    return {
        str(number).encode(), f"{number:x}".encode(), f"{number:X}".encode(), number.to_bytes(size, "little"),
        number.to_bytes(size, "big"),
    }  # fmt: skip


def test_no_seed_leaves_config_and_checkpoints(make_config: MakeConfig, tmp_path: Path) -> None:
    """Not into the model, which is published, nor the report, metrics, statement or ledger; nor does the config."""
    config = make_config({"privacy.sampling_seed": SAMPLING_SEED, "privacy.noise_seed": NOISE_SEED})
    (arm,) = arms.prepare(config, tmp_path)
    words = noise_of(arm)
    assert len(words) >= 2
    run(config, tmp_path)
    secrets = spellings(SAMPLING_SEED, 16) | spellings(NOISE_SEED, 16)
    for order in ("<u4", ">u4"):
        secrets.add(np.array(words[:2], order).tobytes())
    secrets |= {f"{words[0]}, {words[1]}".encode(), b"sampling_seed=", b"noise_seed="}
    shown = [path for path in tmp_path.rglob("*") if path.is_file() and "checkpoints" not in path.parts]
    assert {"report.html", "metrics.jsonl", "privacy.md", "model.safetensors"} <= {path.name for path in shown}
    for path in shown:
        if path == tmp_path / "config.json":
            continue
        content = path.read_bytes()
        assert [secret for secret in secrets if secret in content] == [], path
    assert {path.name for path in (tmp_path / "model").iterdir()} <= {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "vocab.txt", "README.md",
    }  # fmt: skip
    assert "privacy" not in json.loads((tmp_path / "model" / "config.json").read_text())
    kept = b"".join(path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file())
    assert str(SAMPLING_SEED).encode() in kept  # the scan can find one
    assert (tmp_path / "checkpoints").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "config.json").stat().st_mode & 0o777 == 0o600


def test_unset_seeds_are_drawn_each_for_itself(make_config: MakeConfig, tmp_path: Path) -> None:
    """From the operating system: not the seed of the weights, not equal to each other, not those of the last run."""
    drawn, keys = [], []
    for name in ("first", "second"):
        (arm,) = arms.prepare(make_config({**UNSET, "seed": 3}), tmp_path / name)
        drawn.append(arm.run.sampling_seed)
        keys.append(noise_of(arm))
    assert len(set(drawn)) == 2
    assert keys[0] != keys[1]
    for seed in (0, 3, *drawn):
        words = noise_words(jax.tree.leaves(noise_key(seed)))
        assert words not in (keys[0][: len(words)], keys[1][: len(words)])
    assert all(seed > 2**64 for seed in drawn)  # of 128 bits; smaller with probability 2^-64


def test_a_resumed_run_draws_no_seed_anew(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[int, list[int]]] = []
    loop_run = TrainLoop.run

    def spy(self: TrainLoop, state: Any, sampling: Any, *args: Any, **kwargs: Any) -> Any:
        used.append((sampling.seed, noise_words(jax.tree.leaves(state.noise))[:2]))
        return loop_run(self, state, sampling, *args, **kwargs)

    monkeypatch.setattr(TrainLoop, "run", spy)
    config = make_config(UNSET)
    run(config, tmp_path, until=2)
    resumed = run(config, tmp_path)
    assert used[0] == used[1]
    assert resumed.run.sampling_seed != used[1][0]  # it was prepared with a seed of its own, and did not use it


@pytest.mark.parametrize(
    ("seeds", "mode"),
    [({"noise_seed": 7}, 0o600), ({"sampling_seed": 7}, 0o600), ({"noise_seed": None, "sampling_seed": None}, 0o644)],
)
def test_a_config_with_given_seeds_is_for_its_owner(seeds: dict[str, Any], mode: int, tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        claim_workdir(tmp_path, ConfigDict({"privacy": seeds}))
        assert (tmp_path / "config.json").stat().st_mode & 0o777 == mode
        (tmp_path / "config.json").chmod(0o644)  # as an earlier version left it
        claim_workdir(tmp_path, ConfigDict({"privacy": seeds}))
        assert (tmp_path / "config.json").stat().st_mode & 0o777 == mode
        arm = tmp_path / "arms"
        claim_workdir(arm, ConfigDict({"arms": {"noisy": {"privacy": seeds}}}))
        assert (arm / "config.json").stat().st_mode & 0o777 == mode
    finally:
        os.umask(mask)
