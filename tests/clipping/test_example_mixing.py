"""Mixing is found and nothing else is; what the two lists of functions say of themselves is checked with numbers."""

from __future__ import annotations

import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dp_rmt.clipping.example_mixing import mixed_examples

PRIME = 7919
BATCH, TOKENS, FEATURES = 4, 6, 8


def draw(seed):
    """A batch of everything that the functions below use; another seed gives other examples throughout."""
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((BATCH, TOKENS, FEATURES)).astype(np.float32),
        "ids": rng.integers(0, TOKENS, (BATCH, TOKENS)).astype(np.int32),
        "label": ((np.arange(BATCH) + seed) % FEATURES).astype(np.int32),
    }


def report(losses, params=()):
    """What `mixed_examples` says of ``losses(params, batch)``."""

    def many(a):
        return jax.ShapeDtypeStruct((PRIME, *a.shape[1:]), a.dtype)

    batch = jax.tree.map(many, draw(0))
    jaxpr = jax.make_jaxpr(losses)(params, batch).jaxpr
    inputs = [*[False] * len(jax.tree.leaves(params)), *[True] * len(batch)]
    return mixed_examples(jaxpr, batch_size=PRIME, depends_on_batch=inputs)


def influences(losses, params=()):
    """Pairs (j, i) of different examples for which another example j gives another loss i."""
    losses = jax.jit(losses)
    batch, others = draw(0), draw(1)
    reference, pairs = losses(params, batch), []
    assert reference.shape == (BATCH,)
    for j in range(BATCH):
        rows = np.arange(BATCH) == j
        replaced = {k: np.where(rows.reshape(-1, *[1] * (a.ndim - 1)), others[k], a) for k, a in batch.items()}
        changed = losses(params, replaced) != reference
        assert changed[j], "the example does not even influence its own loss"
        pairs += [(j, i) for i in range(BATCH) if i != j and changed[i]]
    return pairs


def per_example(a):
    return jnp.sum(jnp.square(a.reshape(a.shape[0], -1)), axis=1)


def of_module(module):
    """Losses of a flax module of x; its parameters are drawn in the trace."""

    def losses(params, batch):
        y, _ = module.init_with_output(jax.random.key(0), batch["x"])
        return per_example(y)

    return losses


def on_x(function):
    return lambda params, batch: per_example(function(batch["x"]))


ACCEPTED: dict[str, Any] = {}
REFUSED: dict[str, Any] = {}


def listed(table):
    def add(function):
        table[function.__name__] = function
        return function

    return add


@jax.custom_vjp
def own_derivative(x):
    return 2 * x


own_derivative.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))


class Block(nn.Module):
    """A residual layer, the body of a scan; it can subtract the mean over the batch."""

    axis: int

    @nn.compact
    def __call__(self, x, _):
        return x + jnp.tanh(nn.Dense(x.shape[-1])(x)) - jnp.mean(x, axis=self.axis, keepdims=True), None


def stacked(axis, *, remat=False):
    block = nn.remat(Block) if remat else Block
    layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layers(axis)(x, None)[0]

    return Stack()


ACCEPTED |= {
    "layer_norm": of_module(nn.LayerNorm()),
    "group_norm": of_module(nn.GroupNorm(num_groups=2)),
    "batch_norm_with_running_averages": of_module(nn.BatchNorm(use_running_average=True)),
    "attention": of_module(nn.MultiHeadDotProductAttention(num_heads=2)),
    "recurrent": of_module(nn.RNN(nn.SimpleCell(3))),
    "convolution_over_tokens": of_module(nn.Conv(3, (3,))),
    "scan_over_layers": of_module(stacked(-1)),
    "scan_over_rematerialised_layers": of_module(stacked(1, remat=True)),
    "pooling_over_tokens": on_x(lambda x: nn.avg_pool(x, (2,), (2,))),
    "cumsum_over_tokens": on_x(lambda x: jnp.cumsum(x, axis=1)),
    "associative_scan_over_tokens": on_x(lambda x: lax.associative_scan(jnp.multiply, x, axis=1)),
    "sort_features": on_x(lambda x: jnp.sort(x, axis=2) * jnp.arange(8.0)),
    "flip_and_roll_tokens": on_x(lambda x: x[:, ::-1] * jnp.roll(x, 1, axis=1)),
    "top_k_of_features": on_x(lambda x: lax.top_k(x, 2)[0]),
    "fft_over_tokens": on_x(lambda x: jnp.abs(jnp.fft.fft(x, axis=1))),
    "solve_per_example": on_x(lambda x: jnp.linalg.solve(x @ x.swapaxes(1, 2) + 9 * jnp.eye(TOKENS), x)),
    "transposed": on_x(lambda x: (x.transpose(1, 2, 0) * jnp.ones(FEATURES)[:, None]).transpose(2, 0, 1)),
    "merged_with_tokens": on_x(lambda x: jnp.tanh(x.reshape(-1, FEATURES)).reshape(x.shape)),
    "tiled": on_x(lambda x: jnp.tile(x, (2, 1, 1))[len(x) :]),
    "repeated": on_x(lambda x: jnp.repeat(x, 3, axis=0).reshape(-1, 3, TOKENS, FEATURES)),
    "map_over_examples": on_x(lambda x: lax.map(lambda a: lax.cond(a.sum() > 0, jnp.sin, jnp.cos, a), x)),
    "relu": on_x(lambda x: jax.nn.relu(x) + jax.jit(jax.nn.gelu)(x)),
    "own_derivative": on_x(own_derivative),
    "rematerialised": on_x(jax.checkpoint(jnp.sin)),
    "mask_by_position": on_x(lambda x: jnp.where(jnp.arange(len(x))[:, None, None] < 2, x, 2 * x)),
    "first_token_overwritten": on_x(lambda x: x.at[:, 0].set(0.0)),
    "first_example_overwritten": on_x(lambda x: x + 1 + x.at[0].set(0.0)),
    "constants_written": on_x(lambda x: 1 + x + lax.dynamic_update_slice_in_dim(x, 0 * jnp.ones((1, 6, 8)), 1, 0)),
    "loop": on_x(lambda x: lax.fori_loop(0, 3, lambda i, y: y + x[:, i, :1, None], x)),
    "device_put": on_x(lambda x: jax.device_put((x, jnp.ones(3)))[0]),
    "barrier": on_x(lambda x: lax.optimization_barrier((x, jnp.ones(3)))[0]),
    "half_precision": on_x(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)),
    "padded_tokens": on_x(lambda x: jnp.pad(x, ((0, 0), (1, 0), (0, 0)))),
    "one_slice_of_all": on_x(lambda x: lax.dynamic_slice_in_dim(x, x.shape[0] - x.shape[0], 2, axis=1)),
}


@listed(ACCEPTED)
def integer_labels(params, batch):
    return optax.softmax_cross_entropy_with_integer_labels(batch["x"][:, 0], batch["label"])


@listed(ACCEPTED)
def one_hot_labels(params, batch):
    return -jnp.sum(jax.nn.log_softmax(batch["x"][:, 0]) * jax.nn.one_hot(batch["label"], FEATURES), axis=-1)


@listed(ACCEPTED)
def labels_taken_along_axis(params, batch):
    return per_example(jnp.take_along_axis(batch["x"][:, 0], batch["label"][:, None], axis=1))


@listed(ACCEPTED)
def own_position_as_index(params, batch):
    x, rows = batch["x"], jnp.arange(len(batch["x"]))
    hot = jnp.zeros_like(x[:, 0]).at[rows, batch["label"]].add(x[:, 0, 0])
    tokens = x[rows[:, None], batch["ids"]]
    return x[rows, 0, batch["label"]] + per_example(tokens) + per_example(x[rows]) + per_example(hot)


@listed(ACCEPTED)
def own_position_in_a_merged_axis(params, batch):
    ids = batch["ids"].reshape(-1)
    return per_example(batch["x"].reshape(-1, FEATURES)[jnp.arange(len(ids)), ids].reshape(batch["ids"].shape))


@listed(ACCEPTED)
def gradients_of_each_example(params, batch):
    return per_example(jax.grad(lambda x: jnp.sum(jax.nn.softmax(x) ** 2))(batch["x"]))


@listed(ACCEPTED)
def embedding(params, batch):
    return per_example(jnp.sin(jnp.arange(12.0)).reshape(6, 2)[batch["ids"]]) + batch["label"]


@listed(ACCEPTED)
def dropout_with_a_fixed_key(params, batch):
    keep = jax.random.bernoulli(jax.random.key(0), 0.5, batch["x"].shape)
    return per_example(jnp.where(keep, batch["x"], 0.1))


@listed(ACCEPTED)
def dropout_with_a_key_per_example(params, batch):
    keys = jax.vmap(lambda label: jax.random.fold_in(jax.random.key(0), label))(batch["label"])
    return jax.vmap(lambda key, x: jnp.sum(jax.random.normal(key, x.shape) * x))(keys, batch["x"])


@listed(ACCEPTED)
def siamese(params, batch):
    both = jnp.tanh(jnp.concatenate([batch["x"][:, 0], batch["x"][:, 1]]))
    first, second = jnp.split(both, 2)
    return jnp.sum(first * second, axis=1)


@listed(ACCEPTED)
def interleaved_pairs(params, batch):
    pairs = jnp.tanh(batch["x"][:, :2].reshape(-1, FEATURES))
    return jnp.sum(pairs[0::2] * pairs[1::2], axis=1)


@listed(ACCEPTED)
def vmapped_slices(params, batch):
    return jax.vmap(lambda x, i: jnp.sum(lax.dynamic_slice_in_dim(x, i, 2)))(batch["x"], batch["ids"][:, 0])


@listed(ACCEPTED)
def vmapped_loop(params, batch):
    return jax.vmap(lambda x: lax.while_loop(lambda y: y < 9, lambda y: 1.5 * y, 1 + x[0, 0] ** 2))(batch["x"])


@listed(ACCEPTED)
def vmapped_operations(params, batch):
    def one(x, ids):
        y = lax.conv(x.T[None], jnp.ones((FEATURES, FEATURES, 3)), (1,), "SAME")[0].T
        z = jnp.zeros((TOKENS, FEATURES)).at[ids, 1].add(x[:, 0])[jnp.argsort(x[:, 2])]
        w = lax.linalg.tridiagonal_solve(0 * x[:, 0], 2 + x[:, 1] ** 2, 0 * x[:, 0], x)
        y = jnp.linalg.qr(y.T @ y + w.T @ w)[1]
        return jnp.sum(jnp.cumsum(y) ** 2) + jnp.sum(z[::-1] * x) + lax.cond(ids[0] > 2, jnp.max, jnp.min, x)

    return jax.vmap(one)(batch["x"], batch["ids"])


@listed(ACCEPTED)
def scan_over_tokens(params, batch):
    return lax.scan(lambda c, a: (c + per_example(a), c), jnp.zeros(len(batch["x"])), batch["x"].swapaxes(0, 1))[0]


@listed(ACCEPTED)
def metric_that_nobody_uses(params, batch):
    losses = per_example(batch["x"])
    accuracy = jax.jit(lambda a: (a, jnp.mean(a)))(losses)
    return accuracy[0]


def device_mesh():
    return jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])


@listed(ACCEPTED)
def sharded(params, batch):
    x = lax.with_sharding_constraint(batch["x"], NamedSharding(device_mesh(), PartitionSpec("data")))
    spec = PartitionSpec("data")
    return jax.shard_map(per_example, mesh=device_mesh(), in_specs=spec, out_specs=spec)(x)


@jax.custom_vjp
def centred(x):
    return x - jnp.mean(x, axis=0)


centred.defvjp(lambda x: (centred(x), None), lambda _, g: (g,))


def attention_over_examples(x):
    q = x.swapaxes(0, 1)
    return jax.nn.dot_product_attention(q[:, :, None], q[:, :, None], q[:, :, None])[:, :, 0].swapaxes(0, 1)


def noise_of_the_first_key(params, batch):
    """XLA's generator under jax.vmap: all bits come from the first example's key."""
    keys = jax.vmap(lambda label: jax.random.fold_in(jax.random.key(0, impl="rbg"), label))(batch["label"])
    noise = jax.vmap(lambda key: jax.random.normal(key, (TOKENS, FEATURES)))(keys)
    return per_example(batch["x"] * noise)


REFUSED |= {
    "noise_of_the_first_key": noise_of_the_first_key,
    "batch_norm": of_module(nn.BatchNorm(use_running_average=False)),
    "scan_over_layers_with_batch_mean": of_module(stacked(0)),
    "rematerialised_layers_with_batch_mean": of_module(stacked(0, remat=True)),
    "mean_inside_jit": on_x(jax.jit(lambda x: x - jnp.mean(x, axis=0))),
    "mean_inside_remat": on_x(jax.checkpoint(lambda x: x - jnp.mean(x, axis=0))),
    "mean_inside_custom_derivative": on_x(centred),
    "mean_inside_branch": on_x(lambda x: lax.cond(jnp.sum(jnp.ones(2)) > 1, lambda y: y - y.mean(0), jnp.sin, x)),
    "mean_held_constant": on_x(lambda x: x - lax.stop_gradient(jnp.mean(x, axis=0))),
    "softmax_over_examples": on_x(lambda x: jax.nn.softmax(x, axis=0)),
    "attention_over_examples": on_x(attention_over_examples),
    "roll": on_x(lambda x: x * jnp.roll(x, 1, axis=0)),
    "flip": on_x(lambda x: x * x[::-1]),
    "shifted_by_padding": on_x(lambda x: x + jnp.pad(x, ((1, 0), (0, 0), (0, 0)))[:-1]),
    "shifted_by_negative_padding": on_x(lambda x: x + lax.pad(x, 0.0, [(1, -1, 0), (0, 0, 0), (0, 0, 0)])),
    "first_example": on_x(lambda x: x * x[:1]),
    "first_example_by_index": on_x(lambda x: x * x[jnp.zeros(len(x), int)]),
    "neighbour_by_dynamic_slice": on_x(
        lambda x: x * lax.dynamic_slice_in_dim(jnp.concatenate([x, x]), jnp.ones((), int), len(x))
    ),
    "neighbour_by_update": on_x(
        lambda x: x + lax.dynamic_update_slice_in_dim(jnp.zeros((2 * len(x), *x.shape[1:])), x, 1, 0)[: len(x)]
    ),
    "neighbour_by_update_of_two_batches": on_x(
        lambda x: x + lax.dynamic_update_slice_in_dim(jnp.concatenate([x, x]), x, 1, 0)[: len(x)]
    ),
    "shuffled": on_x(lambda x: x * jax.random.permutation(jax.random.key(0), x, axis=0)),
    "shuffled_by_position": on_x(lambda x: x * x[(jnp.arange(len(x)) + 1) % len(x)]),
    "sorted": on_x(lambda x: x * jnp.sort(x, axis=0)),
    "ranked": on_x(lambda x: x * jnp.argsort(x, axis=0)),
    "cumsum_over_examples": on_x(lambda x: jnp.cumsum(x, axis=0)),
    "cumsum_over_merged_axis": on_x(lambda x: jnp.cumsum(x.reshape(-1, FEATURES), axis=0).reshape(x.shape)),
    "associative_scan_over_examples": on_x(lambda x: lax.associative_scan(jnp.multiply, x, axis=0)),
    "top_k_of_examples": on_x(lambda x: x * lax.top_k(x.T, len(x))[0].T),
    "approximately_largest_examples": on_x(
        lambda x: x + lax.approx_max_k(x, len(x), reduction_dimension=0, aggregate_to_topk=True)[0]
    ),
    "fft_over_examples": on_x(lambda x: jnp.abs(jnp.fft.fft(x, axis=0))),
    "matrix_over_examples": on_x(lambda x: jnp.einsum("ij,jtd->itd", jnp.tri(len(x)), x)),
    "general_solve": on_x(lambda x: jnp.linalg.solve(jnp.tri(len(x)), x[:, 0])),
    "solve": on_x(lambda x: lax.linalg.triangular_solve(jnp.tri(len(x)), x[:, 0], left_side=True, lower=True)),
    "whitened": on_x(lambda x: jnp.linalg.qr(x[:, 0, :3])[0]),
    "convolution_over_examples": on_x(
        lambda x: lax.conv(x[None, :, 0].swapaxes(1, 2), jnp.ones((2, 8, 3)), (1,), "SAME").T
    ),
    "pooling_over_examples": on_x(lambda x: nn.avg_pool(x[None, :, 0], (2,), (1,), "SAME")[0]),
    "reshaped_without_transpose": on_x(lambda x: jnp.sum(x.reshape(TOKENS, -1, FEATURES), axis=0)),
    "merged_in_another_order": on_x(
        lambda x: jnp.sum((x.swapaxes(0, 1).reshape(-1, FEATURES) * x.reshape(-1, FEATURES)).reshape(TOKENS, -1, 8), 0)
    ),
    "repeated_and_tiled": on_x(lambda x: jnp.split(jnp.repeat(x, 2, axis=0) * jnp.concatenate([x, x]), 2)[0]),
    "joined_in_different_orders": on_x(
        lambda x: jnp.concatenate([jnp.repeat(x, 2, axis=0), jnp.tile(x, (2, 1, 1))], axis=2)[: len(x)]
    ),
    "joined_with_a_shift": on_x(
        lambda x: x + jnp.concatenate([jnp.zeros((1, 6, 8)), x, jnp.zeros((len(x) - 1, 6, 8))])[: len(x)]
    ),
    "parts_of_merged_axis": on_x(lambda x: x[:, 0] * jnp.split(x[:, :2].reshape(-1, FEATURES), 2)[0]),
    "window_of_two_batches": on_x(lambda x: x + jnp.concatenate([x, x])[1 : len(x) + 1]),
    "half_of_merged_axis": on_x(lambda x: x[:, 0] * x[:, :2].reshape(-1, FEATURES)[: len(x)]),
    "loop_until_all_are_done": on_x(lambda x: lax.while_loop(lambda y: jnp.any(jnp.abs(y) < 9), lambda y: 1.01 * y, x)),
    "loop_that_leaks_through_carry": on_x(
        lambda x: lax.fori_loop(0, 3, lambda i, c: (c[1], c[0] - jnp.mean(c[0], 0)), (x, x))[1]
    ),
    "map_minus_its_sum": on_x(lambda x: x - lax.map(jnp.sum, x).sum()),
    "all_examples_for_each": on_x(lambda x: lax.map(lambda a: jnp.sum(a * x), x)),
}


@listed(REFUSED)
def divided_by_the_tokens_of_the_batch(params, batch):
    return per_example(batch["x"]) / jnp.sum(batch["ids"] > 0)


@listed(REFUSED)
def in_batch_negatives(params, batch):
    scores = batch["x"][:, 0] @ batch["x"][:, 1].T
    return -jnp.diagonal(jax.nn.log_softmax(scores))


@listed(REFUSED)
def scan_over_examples(params, batch):
    def body(mean, x):
        return 0.9 * mean + 0.1 * x, jnp.sum(jnp.square(x - mean))

    return lax.scan(body, jnp.zeros((TOKENS, FEATURES)), batch["x"])[1]


@listed(REFUSED)
def loop_that_exchanges_orders(params, batch):
    orders = jnp.repeat(batch["x"], 2, axis=0), jnp.tile(batch["x"], (2, 1, 1))
    _, tiled = lax.fori_loop(0, 2, lambda i, both: both[::-1], orders)
    return per_example(batch["x"]) + per_example(tiled.reshape(-1, 2, TOKENS, FEATURES))


@listed(REFUSED)
def columns_chosen_by_all(params, batch):
    return per_example(batch["x"][:, 0].at[:, batch["label"]].set(0.0))


@listed(REFUSED)
def sums_by_label(params, batch):
    sums = jax.ops.segment_sum(batch["x"][:, 0], batch["label"] % 2, 2)
    return per_example(batch["x"][:, 0] - sums[batch["label"] % 2])


@listed(REFUSED)
def largest_of_neighbours(params, batch):
    rows = jnp.arange(len(batch["x"]))
    return per_example(jax.ops.segment_max(batch["x"], rows // 2, num_segments=len(rows))[rows // 2])


@listed(REFUSED)
def own_position_in_another_axis(params, batch):
    x = batch["x"][:, :2].reshape(-1, FEATURES)
    return per_example(batch["x"]) + per_example(x[jnp.arange(len(batch["x"]))])


@listed(REFUSED)
def written_to_another_example(params, batch):
    x, rows = batch["x"], jnp.arange(len(batch["x"]))
    return per_example(x[:, 0].at[(rows + 1) % len(x), batch["label"]].add(x[:, 0, 0]))


@pytest.mark.parametrize("name", ACCEPTED)
def test_harmless_functions_pass(name):
    assert report(ACCEPTED[name]) is None


@pytest.mark.parametrize("name", REFUSED)
def test_mixing_is_reported(name):
    line = report(REFUSED[name])
    assert line is not None
    assert "\n" not in line
    assert f"{__file__}:" in line


@pytest.mark.parametrize("name", ACCEPTED)
def test_harmless_functions_are_harmless(name):
    assert influences(ACCEPTED[name]) == []


@pytest.mark.parametrize("name", REFUSED)
def test_mixing_functions_mix(name):
    assert influences(REFUSED[name]) != []


def test_the_line_names_operation_shapes_and_place():
    _, first = inspect.getsourcelines(in_batch_negatives)
    line = report(REFUSED["in_batch_negatives"])
    assert line.startswith(f"dot_general of (batch, 8) and (8, batch) at {__file__}:{first + 2}:")
    assert "(batch, batch)" in line


def test_what_the_results_do_not_need_is_ignored_and_what_they_need_is_not():
    def losses(params, batch):
        return params * per_example(batch["x"])

    assert report(losses, jnp.ones(3).sum()) is None
    assert report(lambda params, batch: losses(jnp.max(batch["x"]), batch)) is not None


def test_parameters_may_be_mixed():
    jaxpr = jax.make_jaxpr(lambda p: jnp.cumsum(p - p.mean()))(jnp.ones(PRIME)).jaxpr
    assert mixed_examples(jaxpr, batch_size=PRIME, depends_on_batch=[False]) is None
    assert mixed_examples(jaxpr, batch_size=PRIME, depends_on_batch=[True]) is not None


@pytest.mark.parametrize("shape", [(), (3,), (3, PRIME), (PRIME, PRIME)])
def test_inputs_without_a_clear_batch_axis_are_refused(shape):
    jaxpr = jax.make_jaxpr(lambda x: x)(jax.ShapeDtypeStruct(shape, jnp.float32)).jaxpr
    assert "input" in str(mixed_examples(jaxpr, batch_size=PRIME, depends_on_batch=[True]))


def test_sums_over_other_devices_are_reported():
    """On several devices the losses may run within shard_map; what comes from another device is of other examples."""
    reports = []

    def losses(params, batch):
        return per_example(batch["x"]) - lax.psum(per_example(batch["x"]), "data")

    def on_device(x):
        reports.extend([report(losses), report(ACCEPTED["relu"])])
        return x

    spec = PartitionSpec("data")
    jax.jit(jax.shard_map(on_device, mesh=device_mesh(), in_specs=spec, out_specs=spec)).lower(jnp.ones(4))
    assert "other devices along ['data']" in reports[0]
    assert reports[1] is None


def test_mutable_arrays_are_reported():
    def losses(params, batch):
        total = jax.new_ref(jnp.zeros_like(batch["x"]))
        total[...] = batch["x"]
        return per_example(total[...])

    assert "mutable" in report(losses)
