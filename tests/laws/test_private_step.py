"""Laws of the whole step: what it is without privacy, what reaches the denoiser, how large its noise is."""

from __future__ import annotations

import dataclasses
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dp_rmt.clipping.execution import Execution
from dp_rmt.denoising import gradient as denoising
from dp_rmt.denoising.gradient import denoise_matrices
from dp_rmt.mechanism import DPSGD
from dp_rmt.noise_addition import add_gaussian_noise
from dp_rmt.training.losses import label_losses
from dp_rmt.training.train_state import TrainState, Transforms
from dp_rmt.training.train_step import make_train_step
from dp_rmt.trees import split_params

BATCH = 8


class Network(nn.Module):
    """Layers that ghost clipping knows; the embedding will be frozen."""

    @nn.compact
    def __call__(self, ids_BxT):
        hidden = nn.LayerNorm(name="norm")(nn.Embed(20, 16, name="embed")(ids_BxT))
        hidden = nn.gelu(nn.Dense(32, name="in")(hidden)).mean(axis=1)
        return nn.Dense(2, name="out")(hidden)


@pytest.mark.parametrize("clipping_method", ["vmap", "ghost"])
def test_without_clipping_noise_and_denoising_it_is_adamw(clipping_method):
    """Five steps against `optax.adamw` on the mean loss, with a frozen part.

    Not bit for bit: the one sums gradients of single examples, the other differentiates the sum. Their gradients differ
    by 1e-7 of the largest entry, and Adam divides by the root mean square, at least eps = 1e-3 for gradients up to 1:
    the parameters agree to 1e-4 of what the learning rate moves them.
    """
    mechanism = DPSGD(
        num_examples=100,
        expected_batch_size=BATCH,
        num_steps=5,
        noise_multiplier=0.0,
        l2_clip_norm=np.inf,
        max_batch_size=BATCH,
    )
    module, rng = Network(), np.random.default_rng(0)
    batches = [{"ids": rng.integers(0, 20, (BATCH, 6)), "label": rng.integers(0, 2, BATCH)} for _ in range(5)]
    everything = jax.jit(module.init)(jax.random.key(0), batches[0]["ids"])["params"]
    params, frozen = split_params(everything, "^(norm|in|out)/")
    optimizer = optax.adamw(1e-2, eps=1e-3, weight_decay=0.1)

    def losses(params, batch):
        return label_losses(module.apply({"params": params}, batch["ids"]), batch["label"])

    transforms = Transforms(mechanism.noise(jax.random.key(1)), optax.identity(), optimizer)
    state = TrainState.create(transforms, params, frozen)
    train_step = jax.jit(make_train_step(mechanism, losses, transforms, execution=Execution(clipping_method)))

    @jax.jit
    def plain_step(params, opt_state, batch):
        grads = jax.grad(lambda p: jnp.mean(losses({**p, **frozen}, batch)))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    plain, opt_state = params, optimizer.init(params)
    for batch in batches:
        state, _ = train_step(state, [(batch, np.zeros(BATCH, bool))])
        plain, opt_state = plain_step(plain, opt_state, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), state.params, plain)
    moved = jax.tree.map(lambda a, b: np.abs(a - np.asarray(b)).max(), state.params, params)
    assert min(jax.tree.leaves(moved)) > 0.003
    assert list(frozen) == ["embed"]
    jax.tree.map(np.testing.assert_array_equal, state.frozen, frozen)


def linear_losses(params, batch):
    """The gradient of an example is its row."""
    return jnp.sum(params["kernel"] * batch["kernel"], (1, 2)) + jnp.sum(params["bias"] * batch["bias"], 1)


def linear_problem(mechanism, transforms, **options):
    params = {"kernel": jnp.zeros((24, 40)), "bias": jnp.zeros(7)}
    state = TrainState.create(transforms, params, {})
    return state, jax.jit(make_train_step(mechanism, linear_losses, transforms, **options))


def linear_batch(seed, scale=1.0):
    """Gradients with a common part of rank one."""
    rng = np.random.default_rng(seed)
    common = np.outer(rng.standard_normal(24), rng.standard_normal(40))
    return {
        "kernel": (scale * (common + rng.standard_normal((BATCH, 24, 40)))).astype(np.float32),
        "bias": (scale * rng.standard_normal((BATCH, 7))).astype(np.float32),
    }


MECHANISM = DPSGD(
    num_examples=100, expected_batch_size=5.0, num_steps=4, noise_multiplier=0.8, l2_clip_norm=0.3, max_batch_size=BATCH
)
NO_PADDING = np.zeros(BATCH, bool)


def recording(transformation):
    """The same transformation, with what came in last kept in its state."""

    def update(updates, state, params=None):
        out, inner = transformation.update(updates, state["inner"], params)
        return out, {"inner": inner, "seen": updates}

    return optax.GradientTransformation(lambda p: {"inner": transformation.init(p), "seen": p}, update)


def test_the_denoiser_is_a_function_of_the_noisy_update_alone():
    """Different clean gradients under noise that happens to hide the difference: the same bits come out."""
    target = linear_batch(9)
    target = {name: jnp.asarray(x[0]) for name, x in target.items()}

    def replace_by_target(updates, state, params=None):
        """Noise whose outcome happens to make any clean gradient the same noisy one."""
        return jax.tree.map(lambda g, t: t + 0.0 * g, updates, target), state

    noise = optax.GradientTransformation(lambda params: optax.EmptyState(), replace_by_target)
    denoise = MECHANISM.denoiser()
    transforms = Transforms(recording(noise), recording(denoise), optax.sgd(1.0))
    state, train_step = linear_problem(MECHANISM, transforms)
    results = []
    for seed, scale in ((1, 1.0), (2, 1e-3)):
        results.append(train_step(state, [(linear_batch(seed, scale), NO_PADDING)])[0])
    first, second = results
    clean = [np.asarray(state.noise["seen"]["kernel"]) for state in results]
    assert np.abs(clean[0] - clean[1]).max() > 0.01 * np.abs(clean[0]).max()  # the clean gradients do differ
    for name in ("params", "denoise", "optimizer"):
        jax.tree.map(np.testing.assert_array_equal, getattr(first, name), getattr(second, name))
    expected, _ = denoise.update(target, denoise.init(target))
    np.testing.assert_allclose(first.params["kernel"], -np.asarray(expected["kernel"]), rtol=0, atol=1e-6)
    assert (np.asarray(first.params["kernel"]) != -np.asarray(target["kernel"])).all()  # it did denoise


def test_the_denoiser_sees_the_noisy_update_and_public_constants():
    """Its input is what the noise gave out and not the clean gradient; it has no other input."""
    transforms = Transforms(
        recording(MECHANISM.noise(jax.random.key(0))), recording(MECHANISM.denoiser()), optax.sgd(1.0)
    )
    state, train_step = linear_problem(MECHANISM, transforms)
    after, _ = train_step(state, [(linear_batch(1), NO_PADDING)])
    noisy, clean = after.denoise["seen"], after.noise["seen"]
    again, _ = jax.jit(MECHANISM.noise(jax.random.key(0)).update)(clean, state.noise["inner"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-7), noisy, again)
    assert (np.asarray(noisy["kernel"]) != np.asarray(clean["kernel"])).all()
    public = {"noise_std", "shrinker", "gate", "rescale", "below_edge", "blend", "svd"}
    public |= {"matrix_rule", "join", "sharding"}
    assert set(inspect.signature(denoise_matrices).parameters) == public
    assert set(inspect.signature(MECHANISM.denoiser().update).parameters) == {"updates", "state", "params"}
    # Its state holds what it computed: a counter and diagnostics. No earlier gradient can come in that way.
    assert denoising.DenoiseState._fields == ("step", "diagnostics", "starts")
    assert denoising.MatrixDiagnostics._fields == ("kept_rank", "top_over_edge")


@pytest.mark.parametrize(
    ("groups", "microbatch_size", "clipping_method"), [(1, None, "vmap"), (3, 2, "vmap"), (2, 4, "ghost")]
)
def test_noise_of_the_update_is_multiplier_times_clip_norm_over_expected_batch_size(
    groups, microbatch_size, clipping_method
):
    """Measured: zero gradients, learning rate 1, a parameter of 10^5 entries (0.22% of std; bound: 5 of those).

    Nothing else may enter: how full the batch is, microbatches, groups, the shape of the batch.
    """
    mechanism, execution = MECHANISM, Execution(clipping_method, microbatch_size)
    module = nn.Dense(400)
    params = {"kernel": jnp.zeros((250, 400)), "bias": jnp.zeros(400)}
    transforms = Transforms(mechanism.noise(jax.random.key(3)), optax.identity(), optax.sgd(1.0))
    state = TrainState.create(transforms, params, {})
    losses = lambda p, b: module.apply({"params": p}, b)[:, 0]  # noqa: E731
    train_step = jax.jit(make_train_step(mechanism, losses, transforms, execution=execution))
    batch = (np.zeros((BATCH, 250), np.float32), np.arange(BATCH) > 1)
    before = state
    state, _ = train_step(state, [batch] * groups)
    moved = np.asarray(before.params["kernel"] - state.params["kernel"])
    expected = 0.8 * 0.3 / 5.0
    score = (np.sqrt(np.mean(np.square(moved))) / expected - 1) * np.sqrt(2 * moved.size)
    assert abs(score) < 5


def test_noise_is_added_once_for_any_number_of_groups_and_never_twice_the_same():
    noise_only = Transforms(MECHANISM.noise(jax.random.key(3)), optax.identity(), optax.sgd(1.0))
    empty = (linear_batch(0), ~NO_PADDING)
    steps = []
    for groups in (1, 3):
        state, train_step = linear_problem(MECHANISM, noise_only)
        first, _ = train_step(state, [empty] * groups)
        second, _ = train_step(first, [empty] * groups)
        steps.append((np.asarray(first.params["kernel"]), np.asarray(second.params["kernel"] - first.params["kernel"])))
    np.testing.assert_array_equal(steps[0][0], steps[1][0])
    assert np.abs(np.corrcoef(steps[0][0].ravel(), steps[0][1].ravel())[0, 1]) < 5 / np.sqrt(24 * 40)


def test_the_sum_is_divided_by_the_expected_batch_size_not_the_observed():
    """An example moves the parameters by the same, however many others were sampled with it."""
    mechanism = dataclasses.replace(MECHANISM, noise_multiplier=0.0)
    transforms = Transforms(add_gaussian_noise(0.0, jax.random.key(0)), optax.identity(), optax.sgd(1.0))
    state, train_step = linear_problem(mechanism, transforms)
    batch = linear_batch(1)
    norms = np.sqrt((batch["kernel"] ** 2).sum((1, 2)) + (batch["bias"] ** 2).sum(1))
    assert (norms > 0.3).all()
    for present in (1, 3, 8):
        after, _ = train_step(state, [(batch, np.arange(BATCH) >= present)])
        for name, x in batch.items():
            expected = -np.einsum("b,b...->...", 0.3 / norms[:present] / 5.0, x[:present])
            np.testing.assert_allclose(after.params[name], expected, rtol=0, atol=1e-6)


def test_padding_reaches_nothing():
    """Garbage and NaN in the rows of padding: the same bits in the state and in every metric."""
    transforms = Transforms(MECHANISM.noise(jax.random.key(0)), MECHANISM.denoiser(), optax.adamw(1e-2))
    state, train_step = linear_problem(MECHANISM, transforms)
    is_padding = np.arange(BATCH) % 3 == 1
    results = []
    for garbage in (0.0, 1.0, np.nan, 1e30):
        batch = {
            name: np.where(is_padding.reshape(-1, *[1] * (x.ndim - 1)), np.float32(garbage), x)
            for name, x in linear_batch(1).items()
        }
        results.append(train_step(state, [(batch, is_padding)]))
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, results[0], other)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results[0]))
