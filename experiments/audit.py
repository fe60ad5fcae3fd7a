"""Attacks runs of this project's own mechanism, right and with mistakes, and bounds their epsilon from below.

    python -m experiments.audit              attacks the code as it is, at every epsilon of --epsilons
    python -m experiments.audit --mutations  also attacks it with every mistake of `dp_rmt.auditing.problems.MUTATIONS`
    python -m experiments.audit --workdir=RUN --runs=2000    attacks the code with the noise, sampling and updates of a
                                             run, and puts the bound into its privacy.md, as `dp-rmt audit` does

The first two write a record per epsilon and print its table, in which "!" marks a bound above the proven epsilon. Their
exit status is 1 if an audit failed (`dp_rmt.auditing.audits`).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from absl import flags

from dp_rmt.auditing.audits import write_records
from dp_rmt.finetuning import command_line, console


def main(argv: list[str]) -> None:
    """Makes the records and prints their tables."""
    del argv
    values = flags.FLAGS
    sizes = {"delta": values.delta, "num_runs": values.runs, "num_canaries": values.canaries, "seed": values.seed}
    problems = write_records(Path(values.results), map(float, values.epsilons), mutations=values.mutations, **sizes)
    for problem in problems:
        print(f"NOT AS IT MUST BE: {problem}")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    if any(re.match(r"--?workdir\b", argument) for argument in sys.argv[1:]):
        console.audit(sys.argv)
    else:
        flags.DEFINE_bool("mutations", False, "also audit the code with mistakes in it")
        flags.DEFINE_list("epsilons", ["3", "8"], "proven epsilons")
        flags.DEFINE_float("delta", 1e-5, "delta of the guarantee; one run takes at most 0.01 / canaries", 0.0, 1.0)
        flags.DEFINE_integer("runs", 24_000, "number of runs with the canary, and again without it", lower_bound=20)
        flags.DEFINE_integer("canaries", 16_000, "of the one run; a multiple of 500, or less than 500", lower_bound=2)
        flags.DEFINE_integer("seed", 0, "seed of coins, sampling and noise")
        flags.DEFINE_string("results", "experiments/studies/audit/results", "where the records lie")
        command_line.run(main)
