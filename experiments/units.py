"""A person's epsilon by both ways of protecting people with several rows, for one's own data sizes.

python -m experiments.units --train=FILE.csv --user_column=customer --epsilon=8 --batch_size=256 --num_steps=300
python -m experiments.units --num_users=5000 --num_rows=42000 --epsilon=8 --batch_size=256 --num_steps=300
"""

from __future__ import annotations

from dp_rmt import environment

environment.prepare()

import numpy as np  # noqa: E402
from absl import flags  # noqa: E402

from dp_rmt.batch_selection import number_users  # noqa: E402
from dp_rmt.data.readers.rows import text_of  # noqa: E402
from dp_rmt.data.readers.tables import read_tables  # noqa: E402
from dp_rmt.finetuning import command_line  # noqa: E402
from dp_rmt.finetuning.units import compared_units  # noqa: E402

FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    try:
        if FLAGS.train is not None:
            rows = read_tables(FLAGS.train)["train"].rows
            sizes = np.bincount(number_users([text_of(row, FLAGS.user_column) for row in rows]))
        elif FLAGS.num_users and FLAGS.num_rows and FLAGS.num_rows >= FLAGS.num_users:
            sizes = np.full(FLAGS.num_users, FLAGS.num_rows // FLAGS.num_users)
            sizes[: FLAGS.num_rows % FLAGS.num_users] += 1
        else:
            raise ValueError("give --train=FILE with --user_column, or --num_users and no fewer --num_rows")
        delta = FLAGS.delta or len(sizes) ** -1.1
        print(f"{len(sizes):,} persons with {sizes.sum():,} rows, at most {sizes.max():,} each; delta {delta:.3g}")
        run = {"batch_size": FLAGS.batch_size, "num_steps": FLAGS.num_steps}
        print(compared_units(sizes, epsilon=FLAGS.epsilon, delta=delta, **run))
    except (ValueError, OSError) as error:
        command_line.stop(error)


if __name__ == "__main__":
    flags.DEFINE_string("train", None, "A file of rows, or what else config.data.path may be.")
    flags.DEFINE_string("user_column", "user", "The column that says whose a row is.")
    flags.DEFINE_integer("num_users", None, "In place of --train: persons, who share the rows evenly.")
    flags.DEFINE_integer("num_rows", None, "In place of --train: rows.")
    flags.DEFINE_float("epsilon", 8.0, "Of a person, by user-level sampling.")
    flags.DEFINE_float("delta", None, "Of a person; None: N^-1.1 for N persons.")
    flags.DEFINE_float("batch_size", 256.0, "Persons in a step.")
    flags.DEFINE_integer("num_steps", 300, "Updates.")
    command_line.run(main)
