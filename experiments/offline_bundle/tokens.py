"""Tokenises the data of a config into its cache folder, for a bundle: no time of a GPU goes to tokenising.

python -m experiments.offline_bundle.tokens --config=configs/sst2_minilm.py --config.data.path=DIR \\
    --config.data.cache_dir=DIR
"""

from __future__ import annotations

from dp_rmt.finetuning import assemble, command_line
from dp_rmt.finetuning.checks import arm_settings
from dp_rmt.finetuning.settings import Settings


def main(settings: Settings, argv: list[str]) -> None:
    """Loads the task once; its tokens do not depend on the arm."""
    del argv
    try:
        task = assemble.load_task(next(iter(arm_settings(settings).values())))
    except (ValueError, OSError) as error:
        command_line.stop(error)
    rows = {"train": task.num_examples} | {name: len(rows["input_ids"]) for name, rows in task.evaluations.items()}
    print(f"{settings.data.cache_dir} has the tokens of {rows}")


if __name__ == "__main__":
    command_line.run_with_settings(main)
