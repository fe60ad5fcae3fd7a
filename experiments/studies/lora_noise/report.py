"""The report of `experiments.studies.lora_noise.study` in plain words, with its tables and its picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from dp_rmt.files import write_atomically
from dp_rmt.reporting.palette import BLACK, BLUE, GREY, ORANGE, PICTURE_STYLE

CONCLUSION = """\
**LoRA alone carries no guarantee here.** The tables below say why:

1. The noise is real. Low-rank adaptation with a random A adds to the gradient of a row g what the formula says, with
   the variance (||g||^2 + g_j^2) / r in entry j, and it is close to a Gaussian.
2. But it is made of the data. Its size is that of the gradient itself: a batch of zero gradients gets no noise, and an
   example that alone has a gradient in some row of the matrix is seen with certainty, since the row is zero without it.
   Differential privacy asks for noise of a size fixed beforehand. The "multiplier" below takes the batch at hand for
   granted; it is no guarantee.
3. All rows of a matrix share one A. Where G A A^T is released, G A A^T G^T is symmetric for the true G and hardly for
   another: an attack that knows the other examples, and not A, tells whether one more was there. A single row tells it
   nothing in this way; a layer has many rows.
4. A is no secret. Whoever gets the adapter gets A with it, and with A known G A has no noise at all.

With Gaussian noise added to clipped gradients (DP-LoRA) there is a guarantee, that of the added noise. While A is
secret, the projection mostly takes something more away from the best attack on this batch, the more the higher the rank
(last table). It can also add something, at rank 1, where a random A makes some gradients much longer (here they are
clipped before the projection; DP-LoRA clips after it). The accountant of this project does not count on it.
"""


def text(record: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [f"# The noise of LoRA on gradients of {record['model']} ({record['config']})", "", CONCLUSION]
    for matrix in record["matrices"]:
        lines += [
            f"## `{matrix['matrix']}`, {matrix['rows']} x {matrix['columns']}, batch {matrix['batch_size']}",
            "",
            "Variance measured over formula; Kolmogorov distance to the Gaussian (exact for the typical entry and for",
            "the one that is largest in its row, and measured over all); standard deviation of ||g A|| / ||g||",
            "(formula); the noise multiplier that this would be, and its epsilon at delta 1e-5, if it were Gaussian,",
            "fixed and independent. Medians of the largest rows.",
            "",
        ]
        lines += _table(
            ("r", "variance", "typical", "worst", "measured (floor)", "1/sqrt r", "scale", '"multiplier"', '"epsilon"'),
            [
                (
                    row["rank"],
                    f"{row['variance_over_formula']:.3f} ± {row['variance_over_formula_error']:.3f}",
                    f"{row['kolmogorov_typical']:.4f}",
                    f"{row['kolmogorov_worst']:.4f}",
                    f"{row['kolmogorov_measured']:.4f} ({row['kolmogorov_floor']:.4f})",
                    f"{row['one_over_sqrt_rank']:.3f}",
                    f"{row['scale_std']:.3f} ({row['scale_std_expected']:.3f})",
                    f"{row['noise_multiplier_it_would_be']:.2f}",
                    f"{row['epsilon_it_would_be']:.2f}",
                )
                for row in matrix["noise"]
            ],
        )
        lines += ["Membership attack on G A A^T, nothing added, A unknown: AUC (95% interval).", ""]
        lines += _table(
            ("r", "rows released", "AUC"),
            [(row["rank"], row["rows"], "{:.3f} ({:.3f} to {:.3f})".format(*row["auc"])) for row in matrix["attack"]],
        )
        lines += [
            "Noise added (z times the clip norm, in the sum): AUC of the best attack on the example with the largest",
            "gradient, and its epsilon at delta 1e-3 for this pair of batches: G A + noise with A secret (simulated),",
            "beside G + noise (exact). Of one pair: no bounds.",
            "",
        ]
        lines += _table(
            ("z", "r", "AUC, projected", "AUC, full", "epsilon, projected", "epsilon, full"),
            [
                (
                    row["noise_multiplier"],
                    row["rank"],
                    *(f"{row[key]:.3f}" for key in ("auc_projected", "auc_full", "epsilon_projected", "epsilon_full")),
                )
                for row in matrix["amplification"]
            ],
        )
    return "\n".join(lines)


def figure(record: dict[str, Any], path: Path) -> None:
    """Draws variance, distance and attack of the first matrix by rank; the format is that of the file's name."""
    matrix = record["matrices"][0]
    noise, ranks = matrix["noise"], [row["rank"] for row in matrix["noise"]]
    with mpl.rc_context(PICTURE_STYLE):
        drawing = Figure(figsize=(11, 3.2), layout="constrained")
        shape, distance, added = drawing.subplots(1, 3)
        shape.axhline(1, color=BLACK, lw=1, ls="--")
        shape.errorbar(
            ranks,
            [row["variance_over_formula"] for row in noise],
            color=BLUE,
            fmt="o",
            yerr=[2 * row["variance_over_formula_error"] for row in noise],
        )
        shape.set(title="variance / formula", xlabel="rank r", xscale="log", ylim=(0.8, 1.2))
        for key, label, colour, style in (
            ("one_over_sqrt_rank", "$1/\\sqrt{r}$", GREY, "--"),
            ("kolmogorov_worst", "worst entry", ORANGE, "o-"),
            ("kolmogorov_typical", "typical entry", BLUE, "o-"),
        ):
            distance.plot(ranks, [row[key] for row in noise], style, color=colour, label=label)
        distance.set(title="distance to the Gaussian", xlabel="rank r", xscale="log", yscale="log")
        distance.legend()
        rows = [row for row in matrix["amplification"] if row["noise_multiplier"] == 1.0]
        for key, label, colour, style in (
            ("auc_projected", "G A + noise", BLUE, "o-"),
            ("auc_full", "G + noise", ORANGE, "--"),
        ):
            added.plot([row["rank"] for row in rows], [row[key] for row in rows], style, color=colour, label=label)
        without = max(row["auc"][0] for row in matrix["attack"])
        added.axhline(without, color=BLACK, lw=1, label="G A A$^T$, no noise")
        added.set(title="AUC of the attack", xlabel="rank r", xscale="log", ylim=(0.2, 1.05))
        added.legend(loc="lower right")
        path.parent.mkdir(parents=True, exist_ok=True)
        drawing.savefig(path, dpi=110)


def write(record: dict[str, Any], path: Path) -> str:
    """Writes the report and returns it."""
    report = text(record)
    write_atomically(path, report)
    return report


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [header, ["--:"] * len(header), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines] + [""]
