"""Checkpoints: everything comes back bit for bit, and another experiment is refused with the difference shown."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dp_rmt.batch_selection import fresh_seed
from dp_rmt.data import fingerprint
from dp_rmt.denoising.gradient import denoise_matrices
from dp_rmt.mechanism import DPSGD
from dp_rmt.noise_addition import NOISE_LAWS, add_gaussian_noise, noise_key
from dp_rmt.training.checkpoint import Checkpoints
from dp_rmt.training.train_state import TrainState, Transforms

MECHANISM = DPSGD(num_examples=50, expected_batch_size=5.0, num_steps=4, noise_multiplier=1.0, l2_clip_norm=0.1)
DATA = {"input_ids": np.arange(200).reshape(50, 4), "label": np.arange(50) % 2}


def make_state(seed=0, value=1.0):
    transforms = Transforms(
        add_gaussian_noise(0.1, noise_key(seed)), denoise_matrices(0.1), optax.adamw(lambda step: 0.1 / (1 + step))
    )
    state = TrainState.create(transforms, {"a": {"kernel": jnp.full((8, 9), value)}}, {"a": {"bias": jnp.zeros(3)}})
    updates, noise = transforms.noise.update(state.params, state.noise)
    updates, denoise = transforms.denoise.update(updates, state.denoise)
    updates, optimizer = transforms.optimizer.update(updates, state.optimizer, state.params)
    return dataclasses.replace(state, step=state.step + 1, noise=noise, denoise=denoise, optimizer=optimizer)


def identity(mechanism=MECHANISM, data=DATA, **others):
    return dataclasses.asdict(mechanism) | {"train_data": fingerprint(data)} | others


@pytest.fixture
def checkpoints(tmp_path):
    """Opens checkpoints of a folder with an identity; closes them after the test."""
    opened = []

    def open_checkpoints(facts, **options):
        opened.append(Checkpoints(tmp_path / "checkpoints", facts, **options))
        return opened[-1]

    yield open_checkpoints
    for each in opened:
        each.close()


def test_nothing_to_restore(checkpoints):
    assert checkpoints(identity()).restore(make_state()) is None
    checkpoints(identity()).check()


def test_state_and_seed_come_back_bit_for_bit(checkpoints):
    """Into a template of other values; the noise key and the 128 bits of the sampler's seed among them."""
    state, seed = make_state(seed=2**77 + 1, value=np.pi), fresh_seed() | 1 << 127
    first = checkpoints(identity())
    first.save(1, state, sampling_seed=seed)
    first.close()
    restored, restored_seed = checkpoints(identity()).restore(make_state(seed=5))
    assert restored_seed == seed
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert jax.tree.map(lambda x: x.dtype, restored) == jax.tree.map(lambda x: x.dtype, state)


def test_the_newest_is_restored_and_old_ones_go(checkpoints, tmp_path):
    first = checkpoints(identity(), keep=2)
    for step in (2, 7, 30):
        first.save(step, make_state(value=float(step)), sampling_seed=0)
    first.close()
    restored, _ = checkpoints(identity()).restore(make_state())
    np.testing.assert_array_equal(restored.params["a"]["kernel"], 30.0)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()} == {"7", "30"}


def test_a_step_that_is_there_is_left_as_it_is(checkpoints):
    first = checkpoints(identity())
    first.save(3, make_state(value=1.0), sampling_seed=0)
    first.save(3, make_state(value=2.0), sampling_seed=0)
    first.close()
    restored, _ = checkpoints(identity()).restore(make_state())
    np.testing.assert_array_equal(restored.params["a"]["kernel"], 1.0)


def test_a_state_that_is_donated_right_after_is_saved_whole(checkpoints):
    """The loop's next step overwrites the buffers of a state while it is being written."""
    state = {"x": jnp.zeros((500, 500))}
    step = jax.jit(lambda s: {"x": s["x"] + 1}, donate_argnums=0)
    first = checkpoints({})
    for number in range(1, 4):
        state = step(state)
        first.save(number, state, sampling_seed=0)
        for _ in range(5):
            state = step(state)
        state = {"x": state["x"] - 5}
    first.close()
    restored, _ = checkpoints({}).restore({"x": jnp.zeros((500, 500))})
    np.testing.assert_array_equal(restored["x"], 3.0)


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        (identity(data={**DATA, "label": np.roll(DATA["label"], 1)}), r"train_data: checkpoint '\w{64}', now '\w{64}'"),
        (identity(data={name: x[:-1] for name, x in DATA.items()}), "train_data"),
        (identity(dataclasses.replace(MECHANISM, expected_batch_size=6.0)), "expected_batch_size: .* 5.0, now 6.0"),
        (identity(dataclasses.replace(MECHANISM, max_batch_size=24)), "max_batch_size: .*, now 24"),
        (identity(dataclasses.replace(MECHANISM, num_examples=51)), "num_examples: .* 50, now 51"),
        (identity(dataclasses.replace(MECHANISM, l2_clip_norm=0.2)), "l2_clip_norm: checkpoint 0.1, now 0.2"),
        (identity(dataclasses.replace(MECHANISM, clip="automatic")), "clip: checkpoint 'flat', now 'automatic'"),
        (identity(dataclasses.replace(MECHANISM, noise_multiplier=0.5)), "noise_multiplier: checkpoint 1.0, now 0.5"),
        (identity(dataclasses.replace(MECHANISM, num_steps=5)), "num_steps: checkpoint 4, now 5"),
        (identity(model="another"), "model: checkpoint None, now 'another'"),
        ({"train_data": fingerprint(DATA)}, "noise_multiplier: checkpoint 1.0, now None"),
    ],
)
def test_another_experiment_is_refused_with_the_difference_shown(checkpoints, tmp_path, changed, difference):
    first = checkpoints(identity())
    first.save(1, make_state(), sampling_seed=0)
    first.close()
    with pytest.raises(ValueError, match=f"belongs to another experiment:\n(.*\n)*  {difference}") as caught:
        checkpoints(changed).restore(make_state())
    with pytest.raises(ValueError, match="belongs to another experiment"):
        checkpoints(changed).check()
    assert str(tmp_path / "checkpoints") in str(caught.value)
    assert "Give a new --workdir" in str(caught.value)
    unchanged = [name for name in identity() if changed.get(name) == identity()[name]]
    assert not any(f"  {name}:" in str(caught.value) for name in unchanged)


def test_a_run_whose_noise_was_made_otherwise_is_refused(checkpoints, monkeypatch):
    """Such as one of an earlier version: repeated, its steps would be released a second time with other noise."""
    with monkeypatch.context() as earlier:
        earlier.setitem(NOISE_LAWS, "threefry2x32", "jax.random.normal")
        first = checkpoints(identity())
        first.save(1, make_state(), sampling_seed=0)
        first.close()
    with pytest.raises(ValueError, match=r"another experiment:\n  noise: checkpoint 'jax.random.normal', now '64 bits"):
        checkpoints(identity()).restore(make_state())


def test_an_identity_may_hold_what_json_changes(checkpoints):
    """Tuples come back as lists, and infinities and None as themselves."""
    facts = identity(lengths=(16, 32), clip_norm=np.inf, nothing=None)
    first = checkpoints(facts)
    first.save(1, make_state(), sampling_seed=0)
    first.close()
    assert checkpoints(facts).restore(make_state()) is not None
    with pytest.raises(ValueError, match=r"lengths: checkpoint \[16, 32\], now \[16, 64\]"):
        checkpoints({**facts, "lengths": (16, 64)}).restore(make_state())


def save_three(checkpoints, **options):
    """Steps 1, 2 and 3, whose kernels are full of 1, 2 and 3."""
    first = checkpoints(identity(), keep=3, **options)
    for step in (1, 2, 3):
        first.save(step, make_state(value=float(step)), sampling_seed=step)
    first.close()


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_byte(folder):
    """In the arrays' own data, which nothing else would notice."""
    path = largest_file(folder / "state")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def truncate(folder):
    path = largest_file(folder / "state")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove_a_file(folder):
    largest_file(folder / "state").unlink()


def garble_the_digests(folder):
    (folder / "sha256.json").write_text('{"state/')


@pytest.mark.parametrize("harm", [flip_a_byte, truncate, remove_a_file, garble_the_digests])
def test_a_damaged_checkpoint_is_passed_over(checkpoints, tmp_path, caplog, harm):
    """The one before is restored, with its own seed, the log says so, and the step can be saved again."""
    save_three(checkpoints)
    harm(tmp_path / "checkpoints" / "3")
    again = checkpoints(identity(), keep=3)
    again.check()
    restored, seed = again.restore(make_state())
    assert (int(restored.step), seed) == (1, 2)  # the state's own step is that of make_state
    np.testing.assert_array_equal(restored.params["a"]["kernel"], 2.0)
    assert "checkpoints/3 is damaged" in caplog.text
    again.save(3, make_state(value=33.0), sampling_seed=2)
    again.close()
    restored, _ = checkpoints(identity()).restore(make_state())
    np.testing.assert_array_equal(restored.params["a"]["kernel"], 33.0)
    assert (tmp_path / "checkpoints" / "3.damaged").is_dir()


def test_several_damaged_checkpoints(checkpoints, tmp_path):
    save_three(checkpoints)
    for step in (2, 3):
        flip_a_byte(tmp_path / "checkpoints" / str(step))
    restored, _ = checkpoints(identity()).restore(make_state())
    np.testing.assert_array_equal(restored.params["a"]["kernel"], 1.0)


def test_nothing_but_damaged_checkpoints_is_an_error(checkpoints, tmp_path):
    """Starting over would draw new noise for steps whose results may be known already."""
    save_three(checkpoints)
    for step in (1, 2, 3):
        flip_a_byte(tmp_path / "checkpoints" / str(step))
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged \(steps 3, 2, 1\)"):
        checkpoints(identity()).restore(make_state())
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} >= {"1", "2", "3"}


def test_another_experiment_is_refused_though_the_newest_is_damaged(checkpoints, tmp_path):
    save_three(checkpoints)
    flip_a_byte(tmp_path / "checkpoints" / "3")
    with pytest.raises(ValueError, match="belongs to another experiment"):
        checkpoints(identity(model="another")).restore(make_state())


def test_checkpoints_from_before_there_were_digests(checkpoints, tmp_path):
    save_three(checkpoints)
    for path in (tmp_path / "checkpoints").glob("*/sha256.json"):
        path.unlink()
    restored, _ = checkpoints(identity()).restore(make_state())
    np.testing.assert_array_equal(restored.params["a"]["kernel"], 3.0)


@pytest.mark.parametrize(("best_is", "kept"), [("max", {"3", "6", "7"}), ("min", {"1", "6", "7"})])
def test_the_newest_and_the_best_are_kept(checkpoints, tmp_path, best_is, kept):
    """Two of the newest, one of the best; a NaN, and a checkpoint without an evaluation, are never the best."""
    options = {"keep": 2, "keep_best": 1, "score": "eval/dev/accuracy", "best_is": best_is}
    first = checkpoints(identity(), **options)
    for step, accuracy in enumerate([0.2, 0.5, 0.8, np.nan, None], start=1):
        scores = {} if accuracy is None else {"eval/dev/accuracy": accuracy, "eval/dev/loss": 1.0}
        first.save(step, make_state(), sampling_seed=0, scores=scores)
    first.close()
    second = checkpoints(identity(), **options)  # which reads the scores
    for step, accuracy in ((6, 0.3), (7, 0.4)):
        second.save(step, make_state(), sampling_seed=0, scores={"eval/dev/accuracy": accuracy})
    second.close()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()} == kept


def test_a_score_that_is_not_there_is_named(checkpoints):
    first = checkpoints(identity(), keep_best=1, score="eval/dev/f1")
    with pytest.raises(ValueError, match=r"no score 'eval/dev/f1' .* only eval/dev/accuracy"):
        first.save(1, make_state(), sampling_seed=0, scores={"eval/dev/accuracy": 0.5})


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep_best": -1}, {"keep_best": 1}, {"best_is": "most"}])
def test_what_to_keep_is_checked(tmp_path, options):
    with pytest.raises(ValueError, match="keep"):
        Checkpoints(tmp_path, {}, **options)
