"""What correlated noise gains at the same epsilon, by its number of bands (config.privacy.noise_bands).

python -m experiments.noise_bands --num_examples=67349 --batch_size=1000 --num_steps=300 --epsilon=8
"""

from __future__ import annotations

from dp_rmt import environment

environment.prepare()

from absl import app, flags  # noqa: E402

from dp_rmt.finetuning import command_line  # noqa: E402
from dp_rmt.finetuning.bands import compared_bands  # noqa: E402

FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    try:
        print(
            compared_bands(
                num_examples=FLAGS.num_examples,
                batch_size=FLAGS.batch_size,
                num_steps=FLAGS.num_steps,
                epsilon=FLAGS.epsilon,
                delta=FLAGS.delta or FLAGS.num_examples**-1.1,
                b1=FLAGS.b1,
            )
        )
    except ValueError as error:
        command_line.stop(error)


if __name__ == "__main__":
    flags.DEFINE_integer("num_examples", 67_349, "Training examples.", lower_bound=1)
    flags.DEFINE_float("batch_size", 1000.0, "Examples in a step.")
    flags.DEFINE_integer("num_steps", 300, "Updates.", lower_bound=1)
    flags.DEFINE_float("epsilon", 8.0, "Of the run.")
    flags.DEFINE_float("delta", None, "Of the run; None: N^-1.1.")
    flags.DEFINE_float("b1", 0.9, "Decay of Adam's first moment.")
    app.run(main)
