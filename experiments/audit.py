"""Attacks runs of this project's own mechanism, right and with mistakes, and bounds their epsilon from below.

    python -m experiments.audit              the code as it is, at every epsilon of --epsilons
    python -m experiments.audit --mutations  and with every mistake of `dp_rmt.auditing.problems.MUTATIONS`
    python -m experiments.audit --workdir=RUN --runs=2000    with the noise, sampling and updates of a run; its
                                             privacy.md then has the bound

Three audits: many runs with one canary in or out (Clopper-Pearson), one run with many canaries (Steinke et al. 2023) of
a linear model whose canaries are worst cases, one run of an MLP with random labels, by white-box and by loss scores.
The code as it is must stay below the proven epsilon; a mistake must come out above it ("!" in the table). Writes a
record per epsilon and prints its table; the exit status is 1 if an audit did not say what it must.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from dp_rmt.auditing.canaries import coin_flips
from dp_rmt.auditing.engines import OneRun, one_run_bound, repeated_bound
from dp_rmt.auditing.problems import (
    CLIP_NORM,
    MUTATIONS,
    Audited,
    canary_losses,
    canary_params,
    mlp_arrays,
    mlp_losses,
    mlp_params,
)
from dp_rmt.files import write_atomically
from dp_rmt.finetuning import command_line
from dp_rmt.reporting import machine
from dp_rmt.reporting.audit_bound import AuditBound, write_audit
from dp_rmt.reporting.numbers import number
from dp_rmt.reporting.privacy_statement import PrivacyStatement, read_privacy, write_privacy
from dp_rmt.training.ledger import FILE as LEDGER
from dp_rmt.training.ledger import only_writer, read_ledger

ONE_RUN_MUTATIONS = tuple(name for name in MUTATIONS if name not in ("padding counted", "noise reused on resume"))
"""Padding shows one canary among the many; and in the full batches of the one run, noise used twice cancels nothing."""

EXAMPLES = 20
"""Of repeated runs."""
MLP_EXAMPLES, MLP_WIDTH, MLP_HIDDEN = 500, 512, 8
SHARE, MLP_SHARE = 0.45, 0.1
"""Of the canaries, guessed at either end. Worst cases are sure all together; of others only the extremes tell."""


def repeated_mechanism(epsilon: float, delta: float, mutation: str = "none") -> Audited:
    """Twenty examples, each sampled with probability 1/2 in each of 8 steps."""
    settings: Any = {"num_examples": EXAMPLES, "expected_batch_size": EXAMPLES / 2, "num_steps": 8}
    settings["max_batch_size"] = EXAMPLES
    return _calibrated(epsilon, delta, mutation, settings)


def full_batch_mechanism(
    epsilon: float, delta: float, num_examples: int, num_steps: int, mutation: str = "none"
) -> Audited:
    """All examples in every step."""
    settings: Any = {"num_examples": num_examples, "expected_batch_size": float(num_examples), "num_steps": num_steps}
    settings["max_batch_size"] = num_examples
    return _calibrated(epsilon, delta, mutation, settings)


def audit_repeated(epsilon: float, *, delta: float, num_runs: int, seed: int, mutation: str = "none") -> dict[str, Any]:
    """Many runs with one worst-case canary in or out; the row of a record."""
    mechanism = repeated_mechanism(epsilon, delta, mutation)
    claim = {"proven": epsilon, "delta": delta}
    return _timed(
        mechanism, "repeated runs", claim, lambda: repeated_bound(mechanism, num_runs=num_runs, delta=delta, seed=seed)
    )


def audit_one_run(
    epsilon: float, *, delta: float, num_canaries: int, seed: int, mutation: str = "none"
) -> dict[str, Any]:
    """One run of the linear model with worst-case canaries; the row of a record."""
    mechanism = full_batch_mechanism(epsilon, delta, num_canaries, num_steps=4, mutation=mutation)
    flips = coin_flips(num_canaries, seed)
    rows, size = {"row": np.arange(num_canaries)}, min(500, num_canaries)
    run = OneRun(mechanism, canary_losses, canary_params(num_canaries), rows, microbatch_size=size)

    def bound() -> dict[str, Any]:
        scores = run.scores(flips, seed=seed, learning_rate=1.0)
        return one_run_bound(scores["gradient"], flips, share=SHARE, delta=delta)

    return _timed(mechanism, "one run, linear", {"proven": epsilon, "delta": delta}, bound)


def audit_mlp(epsilon: float, *, delta: float, seed: int, mutation: str = "none") -> list[dict[str, Any]]:
    """One run of the MLP: the rows of white-box and of loss scores."""
    mechanism = full_batch_mechanism(epsilon, delta, MLP_EXAMPLES, num_steps=30, mutation=mutation)
    flips = coin_flips(MLP_EXAMPLES, seed)
    params, arrays = mlp_params(MLP_WIDTH, MLP_HIDDEN, seed), mlp_arrays(MLP_EXAMPLES, MLP_WIDTH, seed)
    start = time.perf_counter()
    run = OneRun(mechanism, mlp_losses, params, arrays, microbatch_size=MLP_EXAMPLES)
    scores = run.scores(flips, seed=seed, learning_rate=1.0)
    seconds = round(time.perf_counter() - start, 1)
    claim = {"proven": epsilon, "delta": delta}

    def bound(name: str) -> dict[str, Any]:
        return one_run_bound(scores[name], flips, share=MLP_SHARE, delta=delta)

    rows = [_timed(mechanism, f"one run, MLP, {name}", claim, lambda name=name: bound(name)) for name in scores]
    return [row | {"seconds": seconds} for row in rows]


def audit(
    epsilon: float, *, mutations: bool, delta: float, num_runs: int, num_canaries: int, seed: int
) -> list[dict[str, Any]]:
    """All rows of one proven epsilon."""
    names = tuple(MUTATIONS) if mutations else ("none",)
    rows = []
    for mutation in names:
        rows.append(audit_repeated(epsilon, delta=delta, num_runs=num_runs, seed=seed, mutation=mutation))
        if mutation in ONE_RUN_MUTATIONS:
            one_run_delta = min(delta, 0.01 / num_canaries)
            rows.append(
                audit_one_run(epsilon, delta=one_run_delta, num_canaries=num_canaries, seed=seed, mutation=mutation)
            )
        if mutation in ("none", "noise removed"):
            rows += audit_mlp(epsilon, delta=delta, seed=seed, mutation=mutation)
    return rows


def audit_workdir(workdir: Path, *, num_runs: int, seed: int, confidence: float = 0.95) -> AuditBound:
    """Audits the code with a run's noise multiplier, sampling and updates, and puts the bound into its statement.

    The run itself is not attacked: its canaries would have to be in its data. Repeated runs of twenty examples are.

    Args:
      workdir: of a private run; gets ``audit.json``, and privacy.json and privacy.md with the bound.
      num_runs: with, and so many without, the canary; the bound cannot exceed about ln of it.
      seed: of sampling and noise.
      confidence: of the bound.

    Returns:
      The bound.

    Raises:
      FileNotFoundError: there is no run.
      ValueError: it is not private, has done nothing, or its statement is broken.
    """
    statement = PrivacyStatement.from_json(read_privacy(workdir))
    if not statement.is_private or statement.delta is None:
        raise ValueError(f"{workdir}: this run is not private, so there is no guarantee to audit")
    entries = read_ledger(workdir)
    if entries and entries[-1].updates > statement.num_steps:
        raise ValueError(
            f"{workdir}: privacy.json speaks of {statement.num_steps:,} updates, ledger.jsonl of "
            f"{entries[-1].updates:,}: run the job again, which writes the statement anew"
        )
    if statement.num_steps == 0:
        raise ValueError(f"{workdir}: this run has done no update, so there is nothing to audit")
    mechanism = Audited(
        num_examples=EXAMPLES,
        expected_batch_size=EXAMPLES * statement.sampling_probability,
        num_steps=statement.num_steps,
        noise_multiplier=statement.noise_multiplier,
        l2_clip_norm=CLIP_NORM,
        max_batch_size=EXAMPLES,
    )
    found = repeated_bound(mechanism, num_runs=num_runs, delta=statement.delta, seed=seed, confidence=confidence)
    bound = AuditBound(
        epsilon=found["epsilon"],
        delta=statement.delta,
        confidence=confidence,
        is_this_run=False,
        subject=f"{2 * num_runs:,} repeated runs of {EXAMPLES} examples, one a worst-case canary that is in or out",
        noise_multiplier=statement.noise_multiplier,
        sampling_probability=statement.sampling_probability,
        num_steps=statement.num_steps,
    )
    write_audit(workdir, bound)
    alone = only_writer(workdir) if (workdir / LEDGER).exists() else contextlib.nullcontext()
    with contextlib.suppress(BlockingIOError), alone:  # a run that goes on meanwhile writes it itself, with this bound
        now = PrivacyStatement.from_json(read_privacy(workdir))  # it may have gone on, and have spent more
        write_privacy(workdir, dataclasses.replace(now, audit=bound))
    return bound


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What the audits should have said and did not: the right code above its epsilon, or a mistake that none shows."""
    found = [
        f"{row['audit']}: {_rounded_down(row['epsilon'])} > {row['proven']}"
        for row in rows
        if row["mutation"] == "none" and row["epsilon"] > row["proven"]
    ]
    for mutation in {row["mutation"] for row in rows} - {"none"}:
        if not any(row["epsilon"] > row["proven"] for row in rows if row["mutation"] == mutation):
            found.append(f"{mutation}: no audit shows it")
    return found


def table(record: dict[str, Any]) -> str:
    """The bounds of a record as a Markdown table."""
    columns = [f"proven {record['proven']:g}", "law test", *_audits(record)]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for mutation, law in MUTATIONS.items():
        cells = []
        for audit in _audits(record):
            rows = [row for row in record["rows"] if (row["mutation"], row["audit"]) == (mutation, audit)]
            bound = rows[0]["epsilon"] if rows else None
            cells.append("" if bound is None else f"{_rounded_down(bound)}{'!' * (bound > record['proven'])}")
        if any(cells):
            lines.append(f"| {mutation} | {law.partition('::')[2].replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Makes the records and prints their tables."""
    del argv
    values = flags.FLAGS
    if values.workdir:
        try:
            bound = audit_workdir(Path(values.workdir), num_runs=values.runs, seed=values.seed)
        except (ValueError, OSError) as error:
            command_line.stop(error)
        epsilon, delta = number(bound.epsilon, "down"), number(bound.delta)
        print(f"epsilon is at least {epsilon} at delta {delta}: see {values.workdir}/privacy.md")
        return
    folder, problems = Path(values.results), []
    for epsilon in map(float, values.epsilons):
        rows = audit(
            epsilon,
            mutations=values.mutations,
            delta=values.delta,
            num_runs=values.runs,
            num_canaries=values.canaries,
            seed=values.seed,
        )
        problems += failures(rows)
        record = {"proven": epsilon, "seed": values.seed, "machine": machine.description(), "rows": rows}
        name = f"eps{epsilon:g}_seed{values.seed}{'_mutations' if values.mutations else ''}.json"
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, json.dumps(record, indent=1) + "\n")
        print(f"{table(record)}\n", flush=True)
    for problem in problems:
        print(f"NOT AS IT MUST BE: {problem}")
    sys.exit(1 if problems else 0)


def _rounded_down(bound: float) -> str:
    return f"{math.floor(100 * bound) / 100:.2f}"


def _calibrated(epsilon: float, delta: float, mutation: str, settings: dict[str, Any]) -> Audited:
    right = Audited.calibrated(epsilon=epsilon, delta=delta, l2_clip_norm=CLIP_NORM, **settings)
    assert isinstance(right, Audited)
    return dataclasses.replace(right, mutation=mutation)


def _audits(record: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["audit"] for row in record["rows"]))


def _timed(mechanism: Audited, audit: str, claim: dict[str, float], bound: Any) -> dict[str, Any]:
    """A row: what was attacked, what was proven, and what `bound()` says."""
    start = time.perf_counter()
    found = bound()
    return {
        "audit": audit,
        "mutation": mechanism.mutation,
        **claim,
        "noise_multiplier": mechanism.noise_multiplier,
        "num_steps": mechanism.num_steps,
        "sampling_probability": mechanism.sampling_probability,
        **found,
        "seconds": round(time.perf_counter() - start, 1),
    }


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
