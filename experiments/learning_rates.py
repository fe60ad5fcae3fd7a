"""The learning rate of every arm of a config, by the training loss of a short run, on PUBLIC data.

    python -m experiments.learning_rates --config=configs/e2e_stories260k.py --config.data.path=DIR
        --config.model.path=DIR --workdir=runs/e2e_rates --record=experiments/studies/learning_rates/results/e2e.json

It looks at raw losses, and says so in its output, its record and the statement of every run. On private data let a
sweep repeat and select (docs/launch.md). Interrupted runs go on; `dp_rmt.finetuning.rate_search` says how a rate is
chosen.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from dp_rmt.finetuning import command_line
from dp_rmt.finetuning.rate_search import choose_rates
from dp_rmt.finetuning.settings import Settings


def main(settings: Settings, argv: list[str]) -> None:
    """Chooses the rate of every arm that the record does not have yet."""
    del argv
    values = flags.FLAGS
    paths = {"workdir": Path(values.workdir), "record": Path(values.record)}
    try:
        choose_rates(settings, names=values.arms, factors=values.factors, steps=values.steps, **paths)
    except (ValueError, OSError) as error:
        command_line.stop(error)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/learning_rates", "Folder of the runs.")
    flags.DEFINE_string("record", None, "JSON file of the results.")
    flags.DEFINE_list("arms", None, "Only these arms of the config.")
    flags.DEFINE_multi_float("factors", [0.5, 1.0, 2.0], "The first rates, as multiples of the arm's learning rate.")
    flags.DEFINE_integer("steps", 6, "Steps of each run.")
    flags.mark_flag_as_required("record")
    command_line.run_with_settings(main)
