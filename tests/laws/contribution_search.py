"""A search for an example that adds more than the clip norm: layers and whole models, in the corners of the arithmetic.

A case is the parameters of a model and one example. All cases of a model run in one compiled program; what an
example contributes is the clipped sum of a batch in which its only neighbours are NaN, one of them padding.

Numbers are drawn where float32 ends: factors of 1e-38 to 1e38 for all entries, for each token or for each entry, most
of them such that input times output gradient is again near the clip norm; tokens that nearly cancel; cross-entropy at
margins of up to 200.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dp_rmt.clipping.coordinates import AxisMap, Coordinates, LeafAxes
from dp_rmt.clipping.counted_once import trace_layers
from dp_rmt.clipping.ghost import ghost_clipped_grad
from dp_rmt.clipping.per_example import clipped_grad
from dp_rmt.trees import leaves_by_path

ROWS = 6  # of every table
NAMES = (
    *("dense", "bias", "flat", "heads", "einsum", "layer_norm", "rms_norm", "group_norm", "conv", "grouped_conv"),
    *("copied", "embed", "lookup", "head"),
)
"""The layers of `Layers`."""


class Setting(NamedTuple):
    """What is compiled once."""

    model: str = "layers"
    method: str = "vmap"
    clip: str = "flat"
    l2_clip_norm: float = 0.01
    dtype: str = "float32"  # of the layers
    tokens: int = 2
    width: int = 16
    coordinates: bool = False  # of every matrix, with half of its directions damped


class Layers(nn.Module):
    """Every layer that has rules, each on an input of its own and with an output gradient of its own."""

    dtype: Any
    width: int

    @nn.compact
    def __call__(self, example):
        x, w, own = example["x"], example["w"], {"dtype": self.dtype}
        heads = (*x["heads"].shape[:2], 2, self.width // 2)
        table = nn.Embed(ROWS, self.width, name="tied", **own)
        outputs = {
            "dense": nn.Dense(4, use_bias=False, **own)(x["dense"]),
            "bias": nn.Dense(self.width, **own)(x["bias"]),
            "flat": nn.Dense(3, use_bias=False, **own)(x["flat"][:, 0]),
            "heads": nn.DenseGeneral(4, axis=(-2, -1), use_bias=False, **own)(x["heads"].reshape(heads)),
            "einsum": nn.Einsum((2, self.width // 2, 3), "btnh,nhk->btnk", **own)(x["einsum"].reshape(heads)),
            "layer_norm": nn.LayerNorm(**own)(x["layer_norm"]),
            "rms_norm": nn.RMSNorm(**own)(x["rms_norm"]),
            "group_norm": nn.GroupNorm(2, **own)(x["group_norm"]),
            "conv": nn.Conv(4, (2,), use_bias=False, **own)(x["conv"]),
            "grouped_conv": nn.Conv(self.width, (3,), feature_group_count=2, **own)(x["grouped_conv"]),
            "copied": jnp.broadcast_to(
                self.param("copied", nn.initializers.zeros, x["copied"].shape[1:]), x["copied"].shape
            ),
            "embed": nn.Embed(ROWS, self.width, name="embed", **own)(example["ids"]),
            "lookup": table(example["ids"]),
            "head": table.attend(x["head"].astype(self.dtype)),
        }
        losses = 0.0
        for name, y in outputs.items():
            y = y.reshape(len(y), 1 if name == "flat" else x[name].shape[1], -1).astype(w[name].dtype)
            losses += jnp.sum(y * w[name][:, : y.shape[1], : y.shape[2]], axis=(1, 2))
        return losses


class Classifier(nn.Module):
    """Cross-entropy of two linear layers with a norm between, the margin added to the logit of the label."""

    dtype: Any
    width: int

    @nn.compact
    def __call__(self, example):
        h = nn.LayerNorm(dtype=self.dtype)(nn.Dense(self.width, dtype=self.dtype)(example["x"]))
        logits = nn.Dense(2, dtype=self.dtype)(h * example["scale"][:, None, None]).sum(1)
        logits += nn.Dense(2, name="skip", dtype=self.dtype)(example["x"][:, 0])
        return _cross_entropy(logits.astype(example["margin"].dtype), example["margin"])


class LanguageModel(nn.Module):
    """Cross-entropy of every token, with one table as embedding and head."""

    dtype: Any
    width: int

    @nn.compact
    def __call__(self, example):
        table = nn.Embed(ROWS, self.width, dtype=self.dtype)
        h = table(example["ids"]) + nn.Dense(self.width, dtype=self.dtype)(example["x"])
        logits = table.attend(nn.RMSNorm(dtype=self.dtype)(h) * example["scale"][:, None, None].astype(self.dtype))
        return jnp.sum(_cross_entropy(logits.astype(example["margin"].dtype), example["margin"][:, None]), axis=1)


def _cross_entropy(logits, margin):
    return -jax.nn.log_softmax(logits.at[..., 0].add(margin))[..., 0]


MODELS = {"layers": Layers, "classifier": Classifier, "language model": LanguageModel}


@functools.cache
def _compiled(setting: Setting):
    module = MODELS[setting.model](jnp.dtype(setting.dtype), setting.width)
    options = {"l2_clip_norm": setting.l2_clip_norm, "clip": setting.clip}
    if setting.coordinates:
        options["coordinates"] = _coordinates(module, setting)
    if setting.method == "vmap":
        function = clipped_grad(module.apply, **options)
    else:
        function = ghost_clipped_grad(module.apply, method=setting.method, **options)

    def contribution(case):
        params, example = case

        def with_neighbours(a):
            other = jnp.zeros_like(a) if jnp.issubdtype(a.dtype, jnp.integer) else jnp.full_like(a, jnp.nan)
            return jnp.stack([other, a, other])

        batch = jax.tree.map(with_neighbours, example)
        return function(params, batch, is_padding_example=jnp.array([True, False, False]))[0]

    return module, jax.jit(lambda cases: jax.lax.map(contribution, cases))


def _coordinates(module, setting: Setting) -> Coordinates:
    """Maps of both sides of every matrix. Some directions are damped to a thousandth: there the norm is the difference
    of two squares that are a million times as large."""
    rng = np.random.default_rng(0)
    params, example = _case(module, setting, rng)
    batch = jax.tree.map(lambda a: jnp.stack([jnp.asarray(a)] * 2), example)
    leaves, maps = dict(leaves_by_path(params)), {}

    def axis_map(name: str, n: int) -> str:
        damped = np.sqrt(1 - rng.choice([1e-3, 1e-2, 0.3], n // 2))
        basis = np.linalg.qr(rng.standard_normal((n, n)))[0][:, : n // 2] * damped
        maps[name] = AxisMap(jnp.asarray(3.0), jnp.asarray(basis, jnp.float32))
        return name

    axes = []
    for path, matrix in trace_layers(module.apply, params, batch).matrices().items():
        if all(matrix.rule.matrix_axes) and not matrix.rule.has_shared_axes:
            rows, cols = (math.prod(leaves[path].shape[a] for a in side) for side in matrix.rule.matrix_axes)
            names = axis_map(f"{path}:rows", rows + (matrix.bias is not None)), axis_map(f"{path}:cols", cols)
            axes.append(LeafAxes(path, *matrix.rule.matrix_axes, *names, matrix.bias))
    assert axes
    return Coordinates(maps, tuple(axes))


def contributions(setting: Setting, *, cases: int, seed: int) -> np.ndarray:
    """What each case adds to the clipped sum, in units of the clip norm, in float64.

    Args:
      setting: model and method.
      cases: how many to draw.
      seed: of the draw.

    Returns:
      ``(cases,)``.
    """
    module, run = _compiled(setting)
    rng = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        drawn = [_case(module, setting, rng) for _ in range(cases)]
        sums = run(jax.tree.map(lambda *leaves: np.stack(leaves), *drawn))
        squares = [np.square(np.asarray(a, np.float64)).reshape(cases, -1).sum(1) for a in jax.tree.leaves(sums)]
    return np.sqrt(sum(squares)) / setting.l2_clip_norm


def _case(module: nn.Module, setting: Setting, rng: np.random.Generator) -> tuple[Any, Any]:
    shape = (setting.tokens, setting.width)
    example: dict[str, Any] = {"ids": rng.integers(0, rng.integers(1, ROWS + 1), setting.tokens)}
    if setting.model == "layers":
        present = rng.choice(NAMES, rng.choice([1, 1, 3]), replace=False)
        example["x"] = {name: np.zeros(shape) for name in NAMES}
        example["w"] = {name: np.zeros(shape) for name in NAMES}
        for name in present:
            example["x"][name], example["w"][name] = _pair(shape, setting, rng)
    else:
        example["x"] = _factors(shape, setting, rng) * _entries(shape, rng)
        example["scale"] = rng.choice([1, _factors((1, 1), setting, rng)[0, 0]])
        example["margin"] = rng.uniform(0, rng.choice([1, 50, 105, 200]))
    wide = "float64" if setting.dtype == "float64" else "float32"
    example = jax.tree.map(lambda a: np.asarray(a).astype("int32" if np.asarray(a).dtype == int else wide), example)
    return _params(module, setting, rng, wide), example


@functools.cache
def _shapes(module: nn.Module, setting: Setting) -> Any:
    example = {"ids": np.zeros((1, setting.tokens), "int32")}
    x = np.zeros((1, setting.tokens, setting.width), "float32")
    if setting.model == "layers":
        example |= {"x": dict.fromkeys(NAMES, x), "w": dict.fromkeys(NAMES, x)}
    else:
        example |= {"x": x, "scale": np.ones(1, "float32"), "margin": np.ones(1, "float32")}
    return jax.eval_shape(module.init, jax.random.key(0), example)


def _params(module: nn.Module, setting: Setting, rng: np.random.Generator, dtype: str) -> Any:
    """Those of Layers are zero, and so are the losses; else random, now and then zero or near the ends."""
    scale = 0.0 if setting.model == "layers" else rng.choice([0.0, 1.0, 1.0, _factors((1, 1), setting, rng)[0, 0]])
    return jax.tree.map(lambda a: (scale * rng.standard_normal(a.shape)).astype(dtype), _shapes(module, setting))


def _pair(shape: tuple[int, int], setting: Setting, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Input and output gradient of one layer."""
    x, w = _entries(shape, rng), _entries(shape, rng)
    factors = _factors(shape, setting, rng)
    kind = rng.choice(["free", "product", "product", "product"])
    # The norm of the gradient from a thousandth of the clip norm to 10^8 times it.
    size = setting.l2_clip_norm * 10.0 ** rng.uniform(-3, rng.choice([1, 8]))
    x, w = x * factors, w * (_factors(shape, setting, rng) if kind == "free" else size / factors)
    if rng.random() < 0.4 and len(x) > 1:
        half, rest = len(x) // 2, rng.choice([0.0, 1e-7, 1e-5, 1e-2])
        power = 2.0 ** rng.integers(-60, 60, (half, 1)) if rng.random() < 0.5 else 1.0
        x[half : 2 * half], w[half : 2 * half] = x[:half] * power, -w[:half] / power
        w[half : 2 * half] *= 1 + rest * rng.standard_normal((half, 1))
    return x, w


def _entries(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    kind = rng.choice(["normal", "constant", "one", "signs"])
    if kind == "normal":
        return rng.standard_normal(shape)
    if kind == "one":
        return np.eye(shape[1])[rng.integers(0, shape[1], shape[0])]
    return np.full(shape, rng.uniform(0.5, 1)) * (1 if kind == "constant" else rng.choice([-1, 1], shape))


def _factors(shape: tuple[int, int], setting: Setting, rng: np.random.Generator) -> np.ndarray:
    """Powers of ten, for all entries or different ones for tokens or for entries."""
    size = [(1, 1), (1, 1), (shape[0], 1), shape][rng.integers(4)]
    # Of the decimal exponent at which the dtype ends: anywhere, near one, near the roots of the ends, near the ends.
    ends = {"float16": 5, "float64": 308}.get(setting.dtype, 38)
    low, high = [(-1, 1), (-0.05, 0.05), (0.44, 0.5), (-0.5, -0.44), (-1, -0.8), (0.8, 1)][rng.integers(6)]
    return 10.0 ** (ends * rng.uniform(low, high, size))
