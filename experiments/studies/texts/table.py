"""Records of finished text runs, and their table.

    python -m experiments.studies.texts.table --workdirs=runs/e2e_stories260k \\
        --results=experiments/studies/texts/results/stories260k

The program writes a record for every scored arm of the work folders (scores, losses, privacy, seconds per step, the
first texts) and prints all records of the folder as a Markdown table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from dp_rmt.files import write_atomically
from dp_rmt.finetuning import command_line
from dp_rmt.finetuning.statements import privacy_record
from dp_rmt.finetuning.texts import SCORES, samples
from dp_rmt.finetuning.workdir import CONFIG_FILE
from dp_rmt.reporting import machine
from dp_rmt.reporting.numbers import number
from dp_rmt.reporting.records import learning_rate, markdown_table, read_records
from dp_rmt.training.metrics import read_metrics

TEXTS = 12
"""The number of texts of each run in its record."""
SCORE_NAMES = ("bleu", "nist", "meteor", "rouge_l", "cider")
_COLUMNS = ("task", "epsilon", "arm", "learning rate", *SCORE_NAMES, "loss at first", "loss at last", "s per step")

Record = dict[str, Any]


def main(argv: list[str]) -> None:
    """Makes records of the scored arms, and prints the table."""
    del argv
    folder = Path(flags.FLAGS.results)
    for workdir in flags.FLAGS.workdirs:
        for arm in _finished(Path(workdir)):
            made = record(arm)
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{made['config']['data']['task']}_eps{_epsilon(made):g}_{made['arm']}"
            write_atomically(folder / f"{name}.json", json.dumps(made, indent=1, ensure_ascii=False) + "\n")
    print(table(read_records(folder)))


def record(arm: Path) -> Record:
    """The record of a finished arm, without folders of this machine.

    Args:
      arm: the arm's folder, with config.json, metrics.jsonl, privacy.json, texts.jsonl and scores.json.

    Returns:
      A JSON-able record.
    """
    config, lines = _config_of(arm), read_metrics(arm / "metrics.jsonl")
    config["data"] |= {"path": None, "cache_dir": None}
    config["model"] |= {"path": Path(config["model"]["path"]).name}

    def curve(key: str) -> list[tuple[int, float]]:
        return [(line["step"], round(line[key], 5)) for line in lines if line.get(key) is not None]

    return {
        "arm": arm.name,
        "config": config,
        "privacy": privacy_record(arm),
        "scores": json.loads((arm / SCORES).read_text()),
        **{name: curve(name) for name in sorted({key for line in lines for key in line if key.startswith("eval/")})},
        "seconds_per_step": curve("seconds"),
        "machine": machine.description(),
        "texts": samples(arm, TEXTS),
    }


def table(records: list[Record]) -> str:
    """All records as a Markdown table, by task, epsilon and arm."""
    rows = []
    for made in sorted(records, key=lambda r: (r["config"]["data"]["task"], -_epsilon(r), r["arm"])):
        curves = [curve for key, curve in made.items() if key.startswith("eval/") and key.endswith("/loss")]
        losses: list[Any] = curves[0] if curves else []
        seconds = sorted(value for _, value in made["seconds_per_step"])
        scores = made["scores"]
        rows.append(
            [
                made["config"]["data"]["task"],
                _spent(made),
                made["arm"],
                f"{learning_rate(made['config']):g}",
                *(f"{scores[name]:.4f}" if scores.get(name) is not None else "absent" for name in SCORE_NAMES),
                *((f"{losses[0][1]:.3f}", f"{losses[-1][1]:.3f}") if losses else ("", "")),
                f"{seconds[len(seconds) // 2]:.1f}" if seconds else "",
            ]
        )
    return markdown_table(_COLUMNS, rows)


def _finished(workdir: Path) -> Iterator[Path]:
    """The folders of arms, or the folder of a single run, that have been scored."""
    found = sorted(path.parent for path in (*workdir.glob(SCORES), *workdir.glob(f"*/{SCORES}")))
    if not found:
        print(f"{workdir}: no run in it has been scored yet")
    yield from found


def _config_of(arm: Path) -> Record:
    """The arm's own config. In a work folder with only one arm, the file has the arm's changes apart."""
    config = ConfigDict(json.loads((arm / CONFIG_FILE).read_text()))
    for changes in config.get("arms", {}).values():
        config.update(changes)
    return config.to_dict()


def _spent(made: Record) -> str:
    epsilon = made["privacy"].get("epsilon")
    return "inf" if epsilon is None else number(epsilon, "up")


def _epsilon(made: Record) -> float:
    """The epsilon aimed at, by which records are named and sorted."""
    epsilon = made["privacy"].get("target_epsilon")
    return float("inf") if epsilon is None else float(epsilon)


if __name__ == "__main__":
    flags.DEFINE_list("workdirs", [], "Folders of runs; those that are not finished are left out.")
    flags.DEFINE_string("results", "experiments/studies/texts/results/stories260k", "Folder of the records.")
    command_line.run(main)
