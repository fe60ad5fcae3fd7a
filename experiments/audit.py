"""Attacks runs of this project's own mechanism, right and with mistakes, and bounds their epsilon from below.

    python -m experiments.audit              the code as it is, at every epsilon of --epsilons
    python -m experiments.audit --mutations  and with every mistake of `dp_rmt.auditing.problems.MUTATIONS`
    python -m experiments.audit --workdir=RUN --runs=2000    with the noise, sampling and updates of a run; its
                                             privacy.md then has the bound

Writes a record per epsilon and prints its table, in which "!" marks a bound above the proven epsilon; the exit status
is 1 if an audit did not say what it must (`dp_rmt.auditing.audits`).
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags

from dp_rmt.auditing.audits import write_records
from dp_rmt.auditing.run_folder import audit_workdir
from dp_rmt.finetuning import command_line
from dp_rmt.reporting.numbers import number


def main(argv: list[str]) -> None:
    """Makes the records and prints their tables."""
    del argv
    values = flags.FLAGS
    if values.workdir:
        try:
            bound = audit_workdir(Path(values.workdir), num_runs=values.runs, seed=values.seed)
        except (ValueError, OSError) as error:
            command_line.stop(error)
        found, delta = number(bound.epsilon, "down"), number(bound.delta)
        print(f"epsilon is at least {found} at delta {delta}: see {values.workdir}/privacy.md")
        return
    sizes = {"delta": values.delta, "num_runs": values.runs, "num_canaries": values.canaries, "seed": values.seed}
    problems = write_records(Path(values.results), map(float, values.epsilons), mutations=values.mutations, **sizes)
    for problem in problems:
        print(f"NOT AS IT MUST BE: {problem}")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "a run whose settings are audited, instead of --epsilons")
    flags.DEFINE_bool("mutations", False, "also audit the code with mistakes in it")
    flags.DEFINE_list("epsilons", ["3", "8"], "proven epsilons")
    flags.DEFINE_float("delta", 1e-5, "of the guarantee; of one run at most 0.01 / canaries", 0.0, 1.0)
    flags.DEFINE_integer("runs", 24_000, "repeated runs with, and so many without, the canary", lower_bound=20)
    flags.DEFINE_integer("canaries", 16_000, "of the one run; a multiple of 500, or less than 500", lower_bound=2)
    flags.DEFINE_integer("seed", 0, "of coins, sampling and noise")
    flags.DEFINE_string("results", "experiments/studies/audit/results", "where the records lie")
    app.run(main)
