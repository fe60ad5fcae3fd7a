"""A run whose noise comes from a cipher: resumed bit for bit, kept apart from other noise, and as secret as before."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from small_run import make_run

from dp_rmt.mechanism import DPSGD
from dp_rmt.noise_addition import noise_key
from dp_rmt.training.checkpoint import Checkpoints
from dp_rmt.training.prepare import Seeds

SEED = 0x0123456789ABCDEF_0011223344556677
SEEDS = Seeds(1, SEED)
MECHANISM = DPSGD(
    num_examples=200,
    expected_batch_size=50,
    num_steps=4,
    noise_multiplier=2.0,
    l2_clip_norm=0.3,
    noise_generator="chacha20",
)
THREEFRY = dataclasses.replace(MECHANISM, noise_generator="threefry2x32")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    folder = tmp_path_factory.mktemp("chacha20")
    state = make_run(MECHANISM, seeds=SEEDS).train(folder)
    return folder, (state.params, state.noise)


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_goes_on_with_its_noise(whole: tuple[Path, object], tmp_path: Path) -> None:
    make_run(MECHANISM, seeds=SEEDS).train(tmp_path, until=2)
    resumed = make_run(MECHANISM, seeds=SEEDS).train(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, whole[1], (resumed.params, resumed.noise))
    assert resumed.noise.key.shape == (8,)
    other = make_run(THREEFRY, seeds=SEEDS).train(tmp_path / "threefry")
    assert (np.asarray(other.params["w"]) != np.asarray(resumed.params["w"])).all()


@pytest.mark.filterwarnings("ignore")
def test_a_run_does_not_go_on_with_the_noise_of_another_generator(whole: tuple[Path, object]) -> None:
    """Its steps would be released a second time with other noise."""
    with pytest.raises(ValueError, match="noise_generator: checkpoint 'chacha20', now None"):
        make_run(THREEFRY, seeds=SEEDS).check(whole[0])
    noise = Checkpoints(whole[0] / "other", make_run(THREEFRY, seeds=SEEDS).identity)._identity["noise"]
    assert noise == "64 bits of Threefry an entry, through the inverse of the normal distribution"
    assert "ChaCha20" in Checkpoints(whole[0] / "own", make_run(MECHANISM, seeds=SEEDS).identity)._identity["noise"]
    # What was begun before there was a choice can go on.
    assert "noise_generator" not in make_run(THREEFRY, seeds=SEEDS).identity


@pytest.mark.filterwarnings("ignore")
def test_the_key_and_the_seed_stay_in_the_checkpoints(whole: tuple[Path, object]) -> None:
    """Which are for the owner alone; no other file has them, in any spelling of their words."""
    folder = whole[0]
    words = np.asarray(jax.random.key_data(noise_key(SEED, "chacha20"))).astype("<u4")
    spellings = [str(SEED).encode(), f"{SEED:x}".encode(), words.tobytes(), words.tobytes().hex().encode()]
    spellings += [str(word).encode() for word in words] + [f"{word:08x}".encode() for word in words]
    outside = [file for file in folder.iterdir() if file.is_file()]
    assert {file.name for file in outside} >= {"ledger.jsonl", "metrics.jsonl", "privacy.json", "privacy.md"}
    for file in outside:
        content = file.read_bytes()
        assert not any(spelling in content for spelling in spellings), file
    assert (folder / "checkpoints").stat().st_mode & 0o777 == 0o700


def test_the_statement_says_where_the_noise_came_from(whole: tuple[Path, object], tmp_path: Path) -> None:
    page = (whole[0] / "privacy.md").read_text()
    assert "The noise came from ChaCha20 (RFC 8439), a cipher, with a key of 256 bits" in page
    assert "Threefry" not in page
    statement = make_run(THREEFRY, seeds=SEEDS).guarantee.statement(tmp_path, 2)
    assert statement.noise_generator == "threefry2x32"


def test_a_key_of_the_other_generator_is_refused() -> None:
    with pytest.raises(ValueError, match="noise_generator is 'chacha20', and the key is one of 'threefry2x32'"):
        make_run(MECHANISM, seeds=SEEDS, generator="threefry2x32")
    with pytest.raises(ValueError, match="noise_generator must be one of threefry2x32, chacha20"):
        dataclasses.replace(MECHANISM, noise_generator="rbg")
