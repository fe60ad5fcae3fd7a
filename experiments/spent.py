"""What several runs on the same data have spent together (`dp_rmt.finetuning.sweep.spending_table`).

python -m experiments.spent --workdirs=runs/first,runs/second
"""

from __future__ import annotations

from pathlib import Path

from absl import app, flags

from dp_rmt.finetuning import command_line
from dp_rmt.finetuning.sweep.spending_table import spent_together


def main(argv: list[str]) -> None:
    """Prints what was spent."""
    del argv
    try:
        print(spent_together([Path(folder) for folder in flags.FLAGS.workdirs]))
    except (ValueError, OSError) as error:
        command_line.stop(error)


if __name__ == "__main__":
    flags.DEFINE_list("workdirs", None, "Folders of runs on the same data.", required=True)
    app.run(main)
