"""The table and the picture of the privacy-utility-efficiency study, from its records.

python -m experiments.studies.memorisation.table
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from dp_rmt.finetuning import command_line
from dp_rmt.reporting.palette import BLACK, BLUE, GREY, ORANGE, PICTURE_STYLE
from dp_rmt.reporting.records import learning_rate, markdown_table

Record = dict[str, Any]
_COLUMNS = (
    "epsilon",
    "arm",
    "learning rate",
    "seeds",
    "sensitive loss drop, train",
    "the same, test",
    "memorised",
    "worst record, train / test",
    "canary bits (ranked)",
    "membership AUC: loss / relative / Min-K%",
    "TPR at 1% FPR",
    "other loss, test",
    "GFLOP per example",
    "s per example",
    "temp MB",
)
_MARKERS = {"full": "o", "lora": "s"}


def groups(records: list[Record]) -> dict[tuple[float, str], list[Record]]:
    """The records of all seeds by (epsilon, arm); those without privacy come first."""
    found: dict[tuple[float, str], list[Record]] = defaultdict(list)
    for record in records:
        epsilon = record["privacy"]["target_epsilon"]
        found[float("inf") if epsilon is None else epsilon, record["arm"]].append(record)
    return {key: found[key] for key in sorted(found, key=lambda key: (-key[0], _family(key[1]), len(key[1]), key[1]))}


def table(records: list[Record]) -> str:
    """Means over the seeds and ± their standard deviation, as a Markdown table."""
    return markdown_table(_COLUMNS, [_cells(epsilon, arm, runs) for (epsilon, arm), runs in groups(records).items()])


def memorised(record: Record) -> float:
    """By how much more the loss of sensitive tokens fell in training data than in test data, nats per token."""
    found = record["nonprivate"]
    return found["sensitive_drop_train"][0] - found["sensitive_drop_test"][0]


def exposure(record: Record, kind: str) -> float:
    """The largest exposure among the canaries, in bits."""
    return max(canary[kind] for canary in record["canaries"].values())


def _cells(epsilon: float, arm: str, runs: list[Record]) -> list[str]:
    def mean(value: Callable[[Record], float], digits: int = 3) -> str:
        values = np.array([value(run) for run in runs])
        spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{values.mean():.{digits}f}{spread}"

    def attacks(key: str) -> str:
        names = ("loss", "relative_loss", "min_k")
        found = [[run["nonprivate"]["membership"][name][key][0] for run in runs] for name in names]
        return " / ".join(f"{np.mean(values):.2f}" for values in found)

    def worst(split: str) -> str:
        return mean(lambda run: run["nonprivate"][f"sensitive_drop_{split}_worst"], 2)

    cost = runs[0]["cost"]
    flops, seconds = cost["matrix_flops"] / cost["expected_batch_size"], cost["seconds_per_step"]
    return [
        f"{epsilon:g}",
        arm,
        f"{learning_rate(runs[0]['config']):g}",
        str(len(runs)),
        mean(lambda run: run["nonprivate"]["sensitive_drop_train"][0]),
        mean(lambda run: run["nonprivate"]["sensitive_drop_test"][0]),
        mean(memorised),
        f"{worst('train')} / {worst('test')}",
        f"{mean(lambda run: exposure(run, 'sampled'), 1)} ({mean(lambda run: exposure(run, 'ranked'), 1)})",
        attacks("auc"),
        attacks("tpr_at_0.01"),
        mean(lambda run: run["utility"][0]),
        f"{flops / 1e9:.3f}",
        "not measured" if seconds is None else f"{seconds / cost['expected_batch_size']:.4f}",
        f"{cost['temp_bytes'] / 1e6:.0f}",
    ]


def figure(records: list[Record], path: Path) -> None:
    """Draws privacy against utility, one panel for memorised tokens and one for the canary.

    The area of a mark shows the FLOPs of the run.
    """
    panels: list[tuple[str, Callable[[Record], float]]] = [
        ("memorised: sensitive loss drop,\ntrain minus test (nats per token)", memorised),
        ("exposure of the canary (bits, extrapolated)", lambda record: exposure(record, "sampled")),
    ]
    cost = {key: runs[0]["cost"]["matrix_flops"] * runs[0]["steps"] for key, runs in groups(records).items()}
    with mpl.rc_context(PICTURE_STYLE):
        drawn = Figure(figsize=(10, 4.6), layout="constrained")
        axes = drawn.subplots(1, 2, sharex=True)
        for axis, (label, value) in zip(axes, panels, strict=True):
            places = _label_places(records, value)
            for (epsilon, arm), runs in groups(records).items():
                x, y = (np.array([f(run) for run in runs]) for f in (lambda run: run["utility"][0], value))
                size = 400 * cost[epsilon, arm] / max(cost.values())
                axis.errorbar(x.mean(), y.mean(), xerr=_std(x), yerr=_std(y), color=GREY, lw=0.8, zorder=1)
                axis.scatter(x.mean(), y.mean(), s=size, marker=_MARKERS[_family(arm)], color=_colour(arm), alpha=0.75)
                axis.annotate(
                    _label(epsilon, arm),
                    (x.mean(), y.mean()),
                    **places[epsilon, arm],
                    textcoords="offset points",
                    fontsize=8,
                )
            axis.margins(x=0.3, y=0.12)  # room for the labels
            axis.set_xlabel(f"loss on other test tokens (nats); base model: {records[0]['utility_base'][0]:.2f}")
            axis.set_ylabel(label)
        title = "Area of a mark: FLOPs of the whole run. Black: not private; orange: noisy; blue: denoised"
        drawn.suptitle(title, fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, dpi=130)


def _label_places(records: list[Record], value: Callable[[Record], float]) -> dict[tuple[float, str], dict[str, Any]]:
    """Where the labels stand.

    Labels of arms without privacy stand left and right by turns. Those of private arms stand above for full tuning and
    below for LoRA, to the left if noisy and to the right if denoised.
    """
    found = groups(records)
    places: dict[tuple[float, str], dict[str, Any]] = {
        key: {
            "xytext": (0, 14 if _family(key[1]) == "full" else -20),
            "ha": "left" if key[1].endswith("denoised") else "right",
        }
        for key in found
    }
    together = [key for key in found if np.isinf(key[0])]
    together.sort(key=lambda key: np.mean([value(run) for run in found[key]]))
    for rank, key in enumerate(together):
        places[key] = {"xytext": (13, -3)} if rank % 2 else {"xytext": (-13, -3), "ha": "right"}
    return places


def read_records(folder: Path) -> list[Record]:
    """All records of a folder."""
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise SystemExit(f"{folder} holds no records: run experiments.studies.memorisation.study first")
    return [json.loads(path.read_text("utf-8")) for path in paths]


def main(argv: list[str]) -> None:
    """Prints the table and draws the picture."""
    del argv
    records = read_records(Path(flags.FLAGS.results))
    print(table(records))
    figure(records, Path(flags.FLAGS.image))


def _std(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def _family(arm: str) -> str:
    return arm.partition("_")[0]


def _colour(arm: str) -> str:
    return ORANGE if arm.endswith("noisy") else BLUE if arm.endswith("denoised") else BLACK


def _label(epsilon: float, arm: str) -> str:
    name = arm.removesuffix("_noisy").removesuffix("_denoised").replace("_", " ")
    return name if np.isinf(epsilon) else f"{name}, ε {epsilon:g}"


if __name__ == "__main__":
    flags.DEFINE_string("results", "experiments/studies/memorisation/results", "Folder of the records.")
    flags.DEFINE_string("image", "docs/images/memorisation_customersim.png", "Where the picture goes.")
    command_line.run(main)
