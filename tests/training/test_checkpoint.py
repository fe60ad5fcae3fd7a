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
from dp_rmt.denoising import denoise_matrices
from dp_rmt.mechanism import DPSGD
from dp_rmt.noise_addition import add_gaussian_noise, noise_key
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
    first = checkpoints(identity(), max_to_keep=2)
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


def test_an_identity_may_hold_what_json_changes(checkpoints):
    """Tuples come back as lists, and infinities and None as themselves."""
    facts = identity(lengths=(16, 32), clip_norm=np.inf, nothing=None)
    first = checkpoints(facts)
    first.save(1, make_state(), sampling_seed=0)
    first.close()
    assert checkpoints(facts).restore(make_state()) is not None
    with pytest.raises(ValueError, match=r"lengths: checkpoint \[16, 32\], now \[16, 64\]"):
        checkpoints({**facts, "lengths": (16, 64)}).restore(make_state())
