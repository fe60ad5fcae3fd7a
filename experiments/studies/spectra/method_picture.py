"""The picture of the method: what noise does to the singular values of a gradient, and what denoising restores.

python -m experiments.studies.spectra.method_picture --output=docs/images/spectrum.png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from absl import app, flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dp_rmt.finetuning import command_line
from dp_rmt.random_matrix import marchenko_pastur, shrinkage, singular_values
from dp_rmt.reporting.palette import BLACK, BLUE, DARK_GREY, GREY, ORANGE, PICTURE_STYLE

_OUTPUT = flags.DEFINE_string("output", "docs/images/spectrum.png", "where to write the picture (PNG or SVG)")

SHAPE: Any = {"rows": 768, "cols": 3072, "noise_std": 1.0}
# Singular values of the clean gradient over the detection threshold; the last one is lost in the noise.
SIGNAL = (5.0, 4.0, 3.0, 2.2, 1.5, 0.8)


def low_rank_plus_noise(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A clean matrix with these singular values and random singular vectors; the same matrix with noise."""
    rng = np.random.default_rng(seed)
    rows, cols = SHAPE["rows"], SHAPE["cols"]
    left, right = (np.linalg.qr(rng.standard_normal((side, len(SIGNAL))))[0] for side in (rows, cols))
    clean = (left * (np.array(SIGNAL) * marchenko_pastur.detection_threshold(**SHAPE))) @ right.T
    return clean, clean + SHAPE["noise_std"] * rng.standard_normal((rows, cols))


def cosine(a: np.ndarray | jax.Array, b: np.ndarray) -> float:
    """Cosine of the angle between two matrices."""
    return float(np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def draw_bulk(axes: Axes, observed: np.ndarray, edge: float) -> None:
    """Draws the noisy spectrum: a bulk that random-matrix theory predicts, and the values that stand above it."""
    _, bins, _ = axes.hist(observed, bins=90, color=GREY, label="singular values, noisy")
    grid = np.linspace(bins[0] - 4, edge + 1, 500)
    density = marchenko_pastur.singular_value_density(grid, **SHAPE)
    expected = len(observed) * (bins[1] - bins[0]) * density
    axes.plot(grid, expected, color=BLUE, lw=2, label="theory: pure noise")
    signal = observed[observed > edge]
    axes.plot(signal, np.full(len(signal), 2.2), "v", color=ORANGE, ms=8, label="signal above the edge")
    axes.axvline(edge, color=BLACK, ls="--", lw=1.2)
    axes.text(edge + 4, 0.42 * axes.get_ylim()[1], "bulk edge $s\\,(\\sqrt{m}+\\sqrt{n})$")
    axes.set(xlabel="singular value / noise of one entry, $s$", ylabel="count")
    axes.set_title(f"A noisy {SHAPE['rows']} × {SHAPE['cols']} gradient")
    axes.legend(loc="upper right")


def draw() -> Figure:
    """The figure: the noisy spectrum on the left; the largest values, before and after, on the right."""
    clean, noisy = low_rank_plus_noise()
    matrix = jnp.asarray(noisy, jnp.float32)
    basis, observed = singular_values.short_side_svd(matrix, method="gram")
    original, frobenius = shrinkage.operator(observed, **SHAPE), shrinkage.frobenius(observed, **SHAPE)
    denoised = singular_values.scale_spectrum(matrix, basis, frobenius / observed)
    edge = float(np.asarray(marchenko_pastur.bulk_edge(**SHAPE)))
    true = np.linalg.svd(clean, compute_uv=False)

    figure = Figure(figsize=(10.5, 4.3), layout="constrained")
    bulk, largest = figure.subplots(1, 2, width_ratios=(1.2, 1))
    draw_bulk(bulk, np.asarray(observed), edge)
    index = np.arange(1, len(SIGNAL) + 4)
    largest.plot(index, observed[: len(index)], "s", color=DARK_GREY, ms=7, label="noisy")
    largest.plot(index, true[: len(index)], "_", color=ORANGE, ms=20, mew=3, label="clean")
    largest.plot(index, original[: len(index)], "o", mfc="none", mec=BLUE, mew=1.5, ms=9, label="restored")
    largest.plot(index, frobenius[: len(index)], "o", color=BLUE, ms=5, label="Frobenius-optimal")
    largest.axhline(edge, color=BLACK, ls="--", lw=1.2)
    largest.text(index[-1] + 0.4, edge + 6, "bulk edge", ha="right")
    largest.set(xlabel="index of the singular value", ylabel="singular value / $s$", xticks=index)
    gain = f"{cosine(noisy, clean):.2f} → {cosine(denoised, clean):.2f}"
    largest.set_title(f"Denoised: cosine to the clean {gain}")
    largest.legend(loc="upper right")
    return figure


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; the one flag is --output")
    Path(_OUTPUT.value).parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(PICTURE_STYLE):
        draw().savefig(_OUTPUT.value, dpi=130)


if __name__ == "__main__":
    command_line.run(main)
