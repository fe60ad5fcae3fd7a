"""The mechanism: one set of numbers, and the pieces that are made of them."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import NeighboringRelation

from dp_rmt import accounting
from dp_rmt.batch_selection import max_batch_size_for
from dp_rmt.clipping.execution import ClippingMethod, Execution
from dp_rmt.clipping.per_example import ClippingStyle
from dp_rmt.mechanism import DPSGD
from dp_rmt.noise_addition import NOISE_SUPPORT

SETTINGS = {
    "num_examples": 1000,
    "expected_batch_size": 40.0,
    "num_steps": 20,
    "noise_multiplier": 1.5,
    "l2_clip_norm": 0.2,
}


@pytest.mark.parametrize("clipping_method", ["vmap", "ghost"])
@pytest.mark.parametrize("clip", ["flat", "automatic"])
def test_noise_std_is_multiplier_times_clip_norm_over_expected_batch_size(clip, clipping_method):
    """Whatever the shape of the batch, the microbatches and the way of clipping."""
    mechanism = DPSGD(**SETTINGS, clip=clip, batch_multiple_of=8)
    assert mechanism.noise_std == pytest.approx(1.5 * 0.2 / 40, rel=1e-15)
    gradient = mechanism.clipped_grad(lambda p, b: b, Execution(clipping_method, microbatch_size=8))
    assert gradient.sensitivity() == pytest.approx(0.2 / 40, rel=1e-15)
    replaced = gradient.sensitivity(NeighboringRelation.REPLACE_ONE)
    assert replaced == pytest.approx(2 * 0.2 / 40, rel=1e-15)


@pytest.mark.parametrize("expected_batch_size", [1, 0.3, 7.7, 40, 1000])
@pytest.mark.parametrize("l2_clip_norm", [1e-6, 0.1, 3.0, 1e30])
@pytest.mark.parametrize("clip", get_args(ClippingStyle))
@pytest.mark.parametrize("clipping_method", get_args(ClippingMethod))
def test_noise_std_is_that_of_the_gradient_s_own_sensitivity(clipping_method, clip, l2_clip_norm, expected_batch_size):
    """To the last bit: one formula in one place, whoever asks."""
    changes = {"l2_clip_norm": l2_clip_norm, "expected_batch_size": expected_batch_size, "clip": clip}
    mechanism = DPSGD(**(SETTINGS | changes))
    gradient = mechanism.clipped_grad(lambda p, b: b, Execution(clipping_method))
    assert mechanism.noise_std == mechanism.noise_multiplier * gradient.sensitivity() > 0


def test_noise_std_builds_no_gradient(monkeypatch):
    monkeypatch.setattr(DPSGD, "clipped_grad", lambda *_: pytest.fail("a gradient of no loss was built"))
    assert DPSGD(**SETTINGS).noise_std > 0


def test_noise_and_denoiser_get_this_std():
    mechanism = DPSGD(**SETTINGS)
    zeros = jnp.zeros((200, 500))
    noise = mechanism.noise(jax.random.key(0))
    noisy, _ = noise.update(zeros, noise.init(zeros))
    assert float(jnp.std(noisy)) == pytest.approx(mechanism.noise_std, rel=0.015)  # 1 / sqrt(2 * 10^5) = 0.2%
    denoiser = mechanism.denoiser()
    _, state = denoiser.update({"kernel": noisy}, denoiser.init({"kernel": noisy}))
    edge = mechanism.noise_std * (math.sqrt(200) + math.sqrt(500))
    expected = np.linalg.norm(np.asarray(noisy), 2) / edge
    np.testing.assert_allclose(state.diagnostics["kernel"].top_over_edge, [expected], rtol=1e-5)
    assert abs(expected - 1) < 0.05  # noise ends at the edge: the unit is right


def test_denoiser_takes_options():
    with pytest.raises(ValueError, match="shrinker must be"):
        DPSGD(**SETTINGS).denoiser(shrinker="soft")


def test_without_noise_nothing_is_private():
    mechanism = DPSGD(**{**SETTINGS, "noise_multiplier": 0.0, "l2_clip_norm": math.inf})
    assert mechanism.noise_std == 0.0
    assert mechanism.epsilon(1, 1e-5) == math.inf


def test_sampling_is_what_the_accounting_assumes():
    mechanism = DPSGD(**SETTINGS, batch_multiple_of=8)
    sampling = mechanism.sampling(seed=7)
    assert mechanism.sampling_probability == sampling.sampling_probability == 0.04
    assert sampling.num_examples == 1000
    assert sampling.seed == 7
    assert sampling.max_batch_size == mechanism.max_batch_size == max_batch_size_for(1000, 0.04, multiple_of=8) == 72
    assert mechanism.truncation == accounting.Truncation(num_examples=1000, max_batch_size=72)
    assert DPSGD(**SETTINGS, max_batch_size=64).sampling(0).max_batch_size == 64


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_epsilon_is_the_accountants(accountant):
    mechanism = DPSGD(**SETTINGS, accountant=accountant)
    arguments = {"noise_multiplier": 1.5, "delta": 1e-5, "sampling_probability": 0.04, "accountant": accountant}
    arguments["noise_support"] = NOISE_SUPPORT
    for step in (1, 20):
        expected = accounting.epsilon(**arguments, num_steps=step, truncation=mechanism.truncation)
        assert mechanism.epsilon(step, 1e-5) == expected
    assert mechanism.epsilon(0, 1e-5) == 0.0
    other = "rdp" if accountant == "pld" else "pld"
    assert mechanism.epsilon(20, 1e-5, other) == DPSGD(**SETTINGS, accountant=other).epsilon(20, 1e-5)


def test_calibrated_reaches_its_target_and_no_less():
    settings = {name: value for name, value in SETTINGS.items() if name != "noise_multiplier"}
    mechanism = DPSGD.calibrated(epsilon=2.0, delta=1e-5, **settings, max_batch_size=40)
    assert mechanism == DPSGD(**settings, max_batch_size=40, noise_multiplier=mechanism.noise_multiplier)
    assert 1.97 < mechanism.epsilon(mechanism.num_steps, 1e-5) <= 2.0
    # A batch shape that overflows in every other step costs privacy; one that never does is cheaper.
    assert dataclasses.replace(mechanism, max_batch_size=80).epsilon(mechanism.num_steps, 1e-5) < 1.8


def test_both_methods_of_clipping_give_the_same_gradient():
    module = nn.Dense(2)
    rng = np.random.default_rng(0)
    batch = rng.standard_normal((8, 5)).astype(np.float32)
    params = module.init(jax.random.key(0), batch)

    def losses(params, batch):
        return jnp.sum(module.apply(params, batch) ** 2, axis=1)

    mechanism = DPSGD(**{**SETTINGS, "expected_batch_size": 4.0, "clip": "automatic"})
    vmap, ghost = (mechanism.clipped_grad(losses, Execution(method, 2)) for method in ("vmap", "ghost"))
    (expected, per_example), (actual, _) = (jax.jit(f)(params, batch, is_padding_example=None) for f in (vmap, ghost))
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=1e-6), actual, expected)
    # Sum over the EXPECTED batch size of four, though there are eight.
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(expected)))
    assert norm <= 8 * 0.2 / 4
    gradients = jax.vmap(jax.grad(lambda p, x: losses(p, x[None])[0]), (None, 0))(params, batch)
    factors = 0.2 / (per_example.grad_norm + 0.01) / 4
    by_hand = jax.tree.map(lambda g: np.einsum("b,b...->...", factors, g), gradients)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=1e-6), expected, by_hand)
    with pytest.raises(ValueError, match="ghost clipping has no rule"):
        mechanism.clipped_grad(lambda p, x: x @ p, Execution("ghost"))(jnp.ones(5), batch, is_padding_example=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expected_batch_size": 0.0}, "expected_batch_size must be above 0"),
        ({"expected_batch_size": 1001.0}, "at most the 1000 training examples"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"noise_multiplier": -1.0}, "noise_multiplier must be"),
        ({"noise_multiplier": math.nan}, "noise_multiplier must be"),
        ({"noise_multiplier": math.inf}, "noise_multiplier must be"),
        ({"l2_clip_norm": math.inf}, "without a bound .* no amount of noise is private"),
        ({"l2_clip_norm": 0.0}, "l2_clip_norm must be"),
        ({"l2_clip_norm": math.nan}, "l2_clip_norm must be"),
        ({"l2_clip_norm": 1e-7}, "l2_clip_norm must be at least 1e-06"),  # as the clipped gradient wants it
        ({"l2_clip_norm": 1e31, "clip": "automatic"}, "automatic clipping scales every gradient"),
        ({"max_batch_size": 60, "batch_multiple_of": 8}, "multiple of 8"),
    ],
)
def test_refuses_numbers_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        DPSGD(**{**SETTINGS, **change})


@pytest.mark.parametrize("multiple", [1, 32, 96])
def test_the_batch_shape_fits_microbatches_and_devices(multiple):
    """It was 331, which no microbatch of 32 divides: the first step failed."""
    settings = {"num_examples": 2000, "expected_batch_size": 256, "num_steps": 5, "l2_clip_norm": 1.0}
    settings |= {"epsilon": 8.0, "delta": 1e-5, "accountant": "rdp"}
    mechanism = DPSGD.calibrated(batch_multiple_of=multiple, **settings)
    assert mechanism.max_batch_size == max_batch_size_for(2000, 0.128, multiple_of=multiple)
    assert mechanism.max_batch_size % multiple == 0
    batch = jnp.ones((mechanism.max_batch_size, 3))
    padding = jnp.zeros(mechanism.max_batch_size, bool)
    clipped_grad = mechanism.clipped_grad(lambda w, x: x @ w, Execution("vmap", min(multiple, 32)))
    gradient, _ = clipped_grad(jnp.ones(3), batch, is_padding_example=padding)
    assert gradient.shape == (3,)


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("num_examples", 2000.0, "Give the integer 2000"),
        ("num_examples", True, "Give a Python number"),
        ("num_examples", None, "Give a Python number"),
        ("num_steps", 5.5, "Give a whole number"),
        ("num_steps", math.nan, "Give a whole number"),
        ("batch_multiple_of", np.float32(2), "Give the integer 2"),
        ("max_batch_size", "64", "Give a Python number"),
        ("expected_batch_size", "40", "Give a Python number"),
        ("expected_batch_size", math.nan, "got nan"),
        ("l2_clip_norm", np.ones(2), "Give a Python number"),
        ("l2_clip_norm", 1j, "Give a Python number"),
        ("clip", "hard", "one of flat, automatic"),
        ("accountant", "prv", "one of pld, rdp"),
        ("accountant", None, "one of pld, rdp"),
    ],
)
def test_one_door_refuses_what_is_no_number_of_its_kind(name, value, advice):
    settings = {setting: given for setting, given in SETTINGS.items() if setting != "noise_multiplier"} | {name: value}
    doors = functools.partial(DPSGD, noise_multiplier=1.0), functools.partial(DPSGD.calibrated, epsilon=1, delta=1e-5)
    for make in doors:
        with pytest.raises(ValueError, match=name) as error:
            make(**settings)
        assert advice in str(error.value)


def test_no_clip_norm_of_nan_without_noise():
    with pytest.raises(ValueError, match="l2_clip_norm must be positive, got nan"):
        DPSGD(**{**SETTINGS, "noise_multiplier": 0.0, "l2_clip_norm": math.nan})


def test_scalars_of_other_libraries_are_numbers():
    plain = DPSGD(**SETTINGS, batch_multiple_of=8)
    other = DPSGD(
        num_examples=jnp.int32(1000),
        expected_batch_size=np.float64(40.0),
        num_steps=np.int64(20),
        noise_multiplier=jnp.float32(1.5),
        l2_clip_norm=np.float64(0.2),
        batch_multiple_of=jnp.array(8),
    )
    assert other == plain
    assert hash(other) == hash(plain)
    assert all(type(value) in (int, float, str, type(None)) for value in dataclasses.asdict(other).values())


def test_calibrated_names_settings_that_it_does_not_know():
    with pytest.raises(TypeError, match=r"unknown setting num_example, steps; give .* some of num_examples"):
        DPSGD.calibrated(epsilon=1.0, delta=1e-5, num_example=1000, steps=3)
    with pytest.raises(TypeError, match="unknown setting noise_multiplier"):
        DPSGD.calibrated(epsilon=1.0, delta=1e-5, **SETTINGS)
    settings = {**SETTINGS, "l2_clip_norm": math.inf}
    del settings["noise_multiplier"]
    with pytest.raises(ValueError, match="no amount of noise is private"):  # before the search for a multiplier
        DPSGD.calibrated(epsilon=1.0, delta=1e-5, **settings)


def test_the_end_of_the_noise_is_in_epsilon():
    mechanism = DPSGD(**SETTINGS)
    missing = mechanism.delta_of_truncation(20)
    arguments = {"noise_multiplier": 1.5, "sampling_probability": 0.04, "num_steps": 20}
    arguments["truncation"] = mechanism.truncation
    assert missing == accounting.delta_of_truncation(noise_support=NOISE_SUPPORT, **arguments)
    assert 0 < missing < 1e-11
    assert mechanism.epsilon(20, 1e-5) == accounting.epsilon(delta=1e-5 - missing, **arguments)
    assert mechanism.epsilon(20, missing) == math.inf
    assert mechanism.epsilon_by_accountant(20, 1e-5) == {
        name: mechanism.epsilon(20, 1e-5, name) for name in ("pld", "rdp")
    }
    rate = mechanism.largest_true_positive_rate(20, 0.01)
    assert rate == accounting.largest_true_positive_rate(
        false_positive_rate=0.01, noise_support=NOISE_SUPPORT, **arguments
    )
    assert 0.01 < rate < 0.1
    assert (mechanism.delta_of_truncation(0), mechanism.largest_true_positive_rate(0, 0.01)) == (0.0, 0.01)
    assert mechanism.epsilon_by_accountant(0, 1e-5) == {"pld": 0.0, "rdp": 0.0}


def test_is_one_consistent_set_of_numbers():
    mechanism = DPSGD(**SETTINGS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        mechanism.l2_clip_norm = 1.0
    twice = dataclasses.replace(mechanism, l2_clip_norm=0.4)
    assert twice.noise_std == pytest.approx(2 * mechanism.noise_std)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"clipping_method": "loop"}, "one of auto, vmap, bookkeeping, ghost; got 'loop'"),
        ({"microbatch_size": 8.0}, "Give the integer 8"),
        ({"microbatch_size": 0}, "got 0"),
        ({"microbatch_size": "all"}, "'auto', or None for the whole batch, got 'all'"),
        ({"microbatch_size": True}, "got True"),
    ],
)
def test_an_execution_refuses_what_it_does_not_know(wrong, message):
    with pytest.raises(ValueError, match=message):
        Execution(**wrong)


def test_an_execution_takes_numbers_of_other_libraries():
    execution = Execution(microbatch_size=jnp.array(8))
    assert execution == Execution("auto", 8)
    assert type(execution.microbatch_size) is int
    assert Execution() == Execution("auto", "auto")
