"""The profiler of generation on a tiny model: its record and its table, with torch and without."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dp_rmt.models import CausalLanguageModel, DecoderConfig, init_params, save_pretrained
from experiments.benchmarks import generation as profile_generation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = DecoderConfig(
        vocab_size=40,
        hidden_size=8,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        intermediate_size=8,
        max_position_embeddings=32,
    )
    module = CausalLanguageModel(config)
    path = tmp_path_factory.mktemp("models") / "tiny_llama"
    save_pretrained(path, module, jax.tree.map(lambda x: 8 * x, init_params(module, jax.random.key(0))))
    return path


def profile(folder: Path) -> dict[str, Any]:
    return profile_generation.profile(
        str(folder), batch_size=3, prompt_length=5, new_tokens=4, dtype="float32", repeats=3
    )


def test_both_sides_decode_the_same_tokens(folder: Path) -> None:
    pytest.importorskip("torch")
    record = profile(folder)
    assert record["model"] == "tiny_llama"
    assert record["rows_with_the_same_tokens"] == 3
    ours, theirs = record["arms"]["dp_rmt"], record["arms"]["transformers"]
    for arm in (ours, theirs):
        assert arm["seconds"] == statistics.median(arm["seconds_of_rounds"])
        assert arm["tokens_per_second"] == pytest.approx(3 * 4 / arm["seconds"])
        ratios = [a / b for a, b in zip(arm["seconds_of_rounds"], ours["seconds_of_rounds"])]
        assert arm["time_ratio"] == pytest.approx(statistics.median(ratios))
    lines = profile_generation.render(record).splitlines()
    assert lines[0].endswith("3 prompts of 5 tokens or less, 4 new ones")
    assert [line.split()[0] for line in lines[4:6]] == ["dp_rmt", "transformers"]
    assert lines[-1] == "3 of 3 rows have the same tokens"


def test_without_torch_there_is_one_side(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_generation, "has_torch", lambda: False)
    record = profile(folder)
    assert list(record["arms"]) == ["dp_rmt"]
    assert record["rows_with_the_same_tokens"] is None
    assert profile_generation.render(record).endswith("torch is not installed")


def test_prompts_are_padded_on_the_left() -> None:
    ids, mask = profile_generation.prompts(40, 4, 6)
    assert mask.sum(axis=1).tolist() == [6, 5, 4, 3]
    assert (np.diff(mask, axis=1) >= 0).all()
    assert (ids[mask == 0] == 0).all()
    assert ids.max() < 40
