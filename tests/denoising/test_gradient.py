"""Denoising against a brute force in NumPy; what passes through; the diagnostics; many leaves in one program."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dp_rmt.denoising.gates import Kappa
from dp_rmt.denoising.gradient import denoise_matrices
from dp_rmt.denoising.matrix_view import MatrixAxes, to_matrices

NOISE_STD = 0.02
SHAPE = (3, 24, 40)  # a strong signal, a signal at the edge, pure noise


def noisy_matrices(shape=SHAPE, noise_std=NOISE_STD, seed=0, dtype=np.float64):
    """Rank-4 signals of decreasing strength in units of the bulk edge, the last none, plus noise."""
    rng = np.random.default_rng(seed)
    batch, rows, cols = shape
    edge = noise_std * (np.sqrt(rows) + np.sqrt(cols))
    strengths = np.array([[4.0, 2.0, 1.2, 0.8], [1.3, 0.5, 0.0, 0.0], [0.0] * 4])[np.arange(batch) % 3] * edge
    left, right = (np.linalg.qr(rng.standard_normal((batch, n, 4)))[0] for n in (rows, cols))
    clean = np.einsum("bik,bk,bjk->bij", left, strengths, right)
    return (clean + noise_std * rng.standard_normal(shape)).astype(dtype), clean


def brute_force_shrink(name, y, rows, cols, s):
    """The equations as the papers have them, singular value by singular value; y all of one matrix."""
    edge = s * (np.sqrt(rows) + np.sqrt(cols))
    shrunken = []
    for v in y:
        if v <= edge:
            shrunken.append(0.0)
            continue
        a = v**2 - s**2 * (rows + cols)
        root = np.sqrt(a**2 - 4 * s**4 * rows * cols)
        signal = np.sqrt((a + root) / 2)
        product = s**4 * rows * cols
        shrunken.append(
            {
                "frobenius": lambda v=v, root=root: root / v,
                "operator": lambda signal=signal: signal,
                "nuclear": lambda v=v, l=signal, p=product: max(0.0, l**4 - p - np.sqrt(p) * l * v) / (l**2 * v),
                "hard_threshold": lambda v=v: v if v > hard_cut(rows, cols, s) else 0.0,
                "optshrink": lambda v=v: brute_force_optshrink(v, y[y <= edge], rows, cols),
            }[name]()
        )
    return np.array(shrunken)


def hard_cut(rows, cols, s):
    beta = min(rows, cols) / max(rows, cols)
    lam = np.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + np.sqrt(beta**2 + 14 * beta + 1)))
    return lam * np.sqrt(max(rows, cols)) * s


def brute_force_optshrink(z, tail, rows, cols):
    """``-2 D / D'`` with the transform from whole matrices and the derivative from a difference."""

    def transform(z):
        product = 1.0
        for side in (rows, cols):
            squares = np.zeros(side - (min(rows, cols) - len(tail)))
            squares[: len(tail)] = tail**2
            product *= np.mean(z / (z**2 - squares))
        return product

    step = 1e-5 * z
    return -2 * transform(z) / ((transform(z + step) - transform(z - step)) / (2 * step))


def brute_force(noisy, *, shrinker="frobenius", gate=None, rescale="noisy_norm", below_edge="drop", s=NOISE_STD):
    """Matrix by matrix and component by component, from a whole SVD."""
    gate = gate or Kappa(1.0)
    denoised, ranks = [], []
    for matrix in noisy:
        rows, cols = matrix.shape
        u, y, vt = np.linalg.svd(matrix, full_matrices=False)
        eta = brute_force_shrink(shrinker, y, rows, cols, s)
        threshold = gate.kappa * s * (np.sqrt(rows) + np.sqrt(cols))
        result, rank = np.zeros_like(matrix), 0
        for i in range(len(y)):
            passes = (y[0] if gate.per == "layer" else y[i]) > threshold
            if passes and eta[i] > 0:
                result, rank = result + eta[i] * np.outer(u[:, i], vt[i]), rank + 1
            elif below_edge == "keep":
                result = result + y[i] * np.outer(u[:, i], vt[i])
        if rank == 0:
            result = matrix
        elif rescale == "noisy_norm":
            result = result * np.linalg.norm(matrix) / np.linalg.norm(result)
        elif rescale == "signal_norm":
            squared = max(np.linalg.norm(matrix) ** 2 - rows * cols * s**2, 0.0)
            result = result * np.sqrt(squared) / np.linalg.norm(result)
        denoised.append(result)
        ranks.append(rank)
    return np.stack(denoised), ranks


def apply(transformation, updates):
    return jax.jit(transformation.update)(updates, transformation.init(updates))


VARIANTS = [
    *({"shrinker": name} for name in ("frobenius", "operator", "nuclear", "hard_threshold", "optshrink")),
    {"rescale": "signal_norm"},
    {"rescale": "none"},
    {"below_edge": "keep"},
    {"below_edge": "keep", "rescale": "none", "shrinker": "operator"},
    {"gate": Kappa(2.5)},
    {"gate": Kappa(2.5, per="component")},
    {"gate": Kappa(1.3, per="component"), "below_edge": "keep", "rescale": "signal_norm"},
    {"gate": Kappa(0.0, per="component"), "rescale": "none", "shrinker": "operator"},
    {"gate": Kappa(100.0)},
]


@pytest.mark.parametrize(
    ("variant", "transposed"),
    [(variant, False) for variant in VARIANTS] + [(variant, True) for variant in VARIANTS[:6]],
    ids=str,
)
def test_equals_the_brute_force(variant, transposed):
    noisy, _ = noisy_matrices()
    noisy = noisy.swapaxes(1, 2) if transposed else noisy
    expected, ranks = brute_force(noisy, **variant)
    with jax.enable_x64(True):
        denoised, state = apply(denoise_matrices(NOISE_STD, **variant), {"kernel": noisy})
    # float64; the brute force of optshrink takes a derivative by differences.
    tolerance = 1e-6 if variant.get("shrinker") == "optshrink" else 1e-10
    np.testing.assert_allclose(denoised["kernel"], expected, rtol=0, atol=tolerance * np.abs(noisy).max())
    assert state.diagnostics["kernel"].kept_rank.tolist() == ranks


def test_every_variant_gives_something_else():
    """So that the comparison above can tell them apart."""
    noisy, _ = noisy_matrices()
    results = [brute_force(noisy, **variant)[0] for variant in VARIANTS]
    distances = [np.abs(a - b).max() / np.abs(noisy).max() for i, a in enumerate(results) for b in results[:i]]
    assert min(distances) > 1e-3


@pytest.mark.parametrize("svd", ["exact", "gram"])
def test_float32_and_both_decompositions(svd):
    """Singular values of size 1 are found to 1e-6 of the largest, and only those above the edge count."""
    noisy, _ = noisy_matrices()
    expected, ranks = brute_force(noisy)
    denoised, state = apply(denoise_matrices(NOISE_STD, svd=svd), {"kernel": noisy.astype(np.float32)})
    assert denoised["kernel"].dtype == jnp.float32
    np.testing.assert_allclose(denoised["kernel"], expected, rtol=0, atol=1e-5 * np.abs(noisy).max())
    assert state.diagnostics["kernel"].kept_rank.tolist() == ranks


def test_brings_the_gradient_closer_by_as_much_as_theory_says():
    """Rank-4 signal (1, 1/2, 1/4, 1/8) with the first at twice the detection threshold; mean cosines of 20 draws."""
    rows, cols = 16, 1024
    rng = np.random.default_rng(0)
    strengths = 2 * NOISE_STD * (rows * cols) ** 0.25 / 2.0 ** np.arange(4)
    left, right = (np.linalg.qr(rng.standard_normal((20, n, 4)))[0] for n in (rows, cols))
    clean = np.einsum("bik,k,bjk->bij", left, strengths, right)
    noisy = clean + NOISE_STD * rng.standard_normal(clean.shape)
    denoised, _ = apply(denoise_matrices(NOISE_STD), {"kernel": noisy.astype(np.float32)})

    def mean_cosine(x):
        return np.mean([np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x, clean)])

    assert mean_cosine(noisy) == pytest.approx(0.20, abs=0.01)
    assert mean_cosine(np.asarray(denoised["kernel"])) == pytest.approx(0.46, abs=0.04)


@pytest.mark.parametrize("below_edge", ["drop", "keep"])
def test_refused_matrices_pass_through_bit_for_bit(below_edge):
    """Also next to one that is denoised, and where they are not finite."""
    noisy, _ = noisy_matrices((4, 24, 40), dtype=np.float32)
    noisy[1, 2, 3] = np.nan
    denoised, state = apply(denoise_matrices(NOISE_STD, gate=Kappa(2.0), below_edge=below_edge), {"kernel": noisy})
    assert (state.diagnostics["kernel"].kept_rank > 0).tolist() == [True, False, False, True]
    np.testing.assert_array_equal(denoised["kernel"][1:3], noisy[1:3])
    assert (denoised["kernel"][0] != noisy[0]).mean() > 0.99


@pytest.mark.parametrize("shrinker", ["frobenius", "operator", "nuclear", "hard_threshold", "optshrink"])
def test_without_noise_it_is_the_identity_to_rounding(shrinker):
    """Twice through an orthogonal basis of 24 vectors in float32; a zero matrix stays zero."""
    noisy, _ = noisy_matrices(dtype=np.float32)
    noisy[1] = 0.0
    denoised, state = apply(denoise_matrices(0.0, shrinker=shrinker), {"kernel": noisy})
    np.testing.assert_allclose(denoised["kernel"], noisy, rtol=0, atol=3e-6 * np.abs(noisy).max())
    assert state.diagnostics["kernel"].kept_rank.tolist() == [24, 0, 24]


def test_leaves_that_are_no_matrices_are_untouched():
    noisy, _ = noisy_matrices(dtype=np.float32)
    updates = {
        "kernel": jnp.asarray(noisy),
        "bias": jnp.arange(40, dtype=jnp.bfloat16),
        "embedding": jnp.asarray(noisy[0]),
        "thin": {"kernel": jnp.full((40, 2), 5.0)},
        "step": jnp.asarray(3),
    }
    denoised, state = apply(denoise_matrices(NOISE_STD), updates)
    assert list(state.diagnostics) == ["kernel"]
    for name in ("bias", "embedding", "thin", "step"):
        for after, before in zip(jax.tree.leaves(denoised[name]), jax.tree.leaves(updates[name])):
            assert after.dtype == before.dtype
            np.testing.assert_array_equal(after, before)


def test_bfloat16_matrices_come_out_in_float32():
    noisy = jnp.asarray(noisy_matrices()[0], jnp.bfloat16)
    denoised, _ = apply(denoise_matrices(NOISE_STD), {"kernel": noisy})
    wide, _ = apply(denoise_matrices(NOISE_STD), {"kernel": noisy.astype(jnp.float32)})
    assert denoised["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(denoised["kernel"], wide["kernel"])


def test_diagnostics_are_those_of_the_last_update():
    noisy, _ = noisy_matrices(dtype=np.float32)
    updates = {"a": {"kernel": noisy}, "b": {"kernel": noisy[0]}}
    denoise = denoise_matrices(NOISE_STD)
    state = denoise.init(updates)
    assert int(state.step) == 0
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, jax.eval_shape(denoise.update, updates, state)[1])
    update = jax.jit(denoise.update)
    _, state = update(jax.tree.map(lambda x: 0 * x, updates), state)
    _, state = update(updates, state)
    assert int(state.step) == 2
    edge = NOISE_STD * (np.sqrt(24) + np.sqrt(40))
    expected = np.linalg.svd(noisy, compute_uv=False)[:, 0] / edge
    np.testing.assert_allclose(state.diagnostics["a/kernel"].top_over_edge, expected, rtol=1e-5)
    np.testing.assert_allclose(state.diagnostics["b/kernel"].top_over_edge, expected[:1], rtol=1e-5)
    assert state.diagnostics["b/kernel"].kept_rank.dtype == jnp.int32


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((24, 4, 10), MatrixAxes((0,), (1, 2))), ((2, 4, 10, 24), MatrixAxes((1, 2), (3,)))],
    ids=["query kernel", "stacked output kernels"],
)
def test_attention_kernels_by_their_axes(shape, axes):
    """The same as denoising the matrices that the axes name; by heads, it would be another result."""
    flat, _ = noisy_matrices((shape[0] if len(shape) == 4 else 1, 24, 40), dtype=np.float32)
    leaf = flat[0].reshape(shape) if len(shape) == 3 else flat.swapaxes(1, 2).reshape(shape)
    denoise = denoise_matrices(NOISE_STD, matrix_rule=lambda path, leaf: axes)
    denoised, state = apply(denoise, {"attention": leaf})
    expected, ranks = brute_force(flat.astype(np.float64))
    matrices = np.asarray(to_matrices(denoised["attention"], axes))
    matrices = matrices if len(shape) == 3 else matrices.swapaxes(1, 2)
    np.testing.assert_allclose(matrices, expected, rtol=0, atol=1e-5 * np.abs(flat).max())
    assert state.diagnostics["attention"].kept_rank.tolist() == ranks


def test_noise_std_may_follow_a_schedule():
    noisy, _ = noisy_matrices(dtype=np.float32)
    scheduled = denoise_matrices(lambda step: NOISE_STD * (1.0 + step))
    state = scheduled.init({"kernel": noisy})
    for step in range(3):
        denoised, state = jax.jit(scheduled.update)({"kernel": noisy}, state)
        expected, _ = brute_force(noisy.astype(np.float64), s=NOISE_STD * (1 + step))
        np.testing.assert_allclose(denoised["kernel"], expected, rtol=0, atol=1e-5 * np.abs(noisy).max())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_std": -1.0}, "noise_std must be"),
        ({"noise_std": float("nan")}, "noise_std must be"),
        ({"shrinker": "soft"}, "shrinker must be one of frobenius, .*, got 'soft'"),
        ({"rescale": "yes"}, "rescale must be one of"),
        ({"below_edge": "zero"}, "below_edge must be one of"),
        ({"svd": "randomised"}, "svd must be one of"),
    ],
)
def test_refuses_unknown_options(options, message):
    with pytest.raises(ValueError, match=message):
        denoise_matrices(**{"noise_std": 1.0, **options})


def test_a_gate_refuses_wrong_settings():
    with pytest.raises(ValueError, match="at least 0"):
        Kappa(-0.1)
    with pytest.raises(ValueError, match="per 'layer' or per 'component'"):
        Kappa(1.0, per="matrix")


def test_composes_in_a_chain():
    noisy, _ = noisy_matrices(dtype=np.float32)
    denoise = denoise_matrices(NOISE_STD)
    stepped, _ = apply(optax.chain(denoise, optax.sgd(0.5)), {"kernel": noisy})
    np.testing.assert_allclose(stepped["kernel"], -0.5 * apply(denoise, {"kernel": noisy})[0]["kernel"], rtol=1e-6)


MANY_LEAVES = """
import jax, jax.numpy as jnp, optax
import dp_rmt

params = {f"layer_{i}": {"kernel": jnp.ones((2, 32 + 8 * i, 64))} for i in range(4)}
for svd in ("exact", "gram"):
    noise = dp_rmt.add_gaussian_noise(0.1, jax.random.key(0))
    chain = optax.chain(noise, dp_rmt.denoise_matrices(0.1, svd=svd), optax.adam(1e-3))
    state, step = chain.init(params), jax.jit(chain.update)
    for _ in range(50):
        updates, state = step(params, state)
    jax.block_until_ready(updates)
    print(svd, int(state[1].step))
"""


@pytest.mark.slow
def test_many_leaves_in_one_program_do_not_hang():
    """jaxlib 0.10.2 hangs on the CPU when decompositions of one program overlap; here without the setting that
    makes XLA run the parts of a program in order."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}  # quicker to compile
    finished = subprocess.run(
        [sys.executable, "-c", MANY_LEAVES], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.stdout.split() == ["exact", "50", "gram", "50"], finished.stderr
