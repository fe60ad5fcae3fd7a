"""Attacks on this project's own mechanism, right and with mistakes, which bound its epsilon from below.

There are three audits. The first has many runs with one canary in or out (Clopper-Pearson). The second is one run with
many canaries (Steinke et al. 2023), the worst cases for a linear model. The third is one run of an MLP with random
labels, by white-box and by loss scores. The code as it is must stay below the proven epsilon, and a mistake must come
out above it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dp_rmt.auditing.canaries import coin_flips
from dp_rmt.auditing.engines import OneRun, one_run_bound, repeated_bound
from dp_rmt.auditing.problems import (
    CLIP_NORM,
    MUTATIONS,
    OF_USERS,
    Audited,
    canary_losses,
    canary_params,
    mlp_arrays,
    mlp_losses,
    mlp_params,
)
from dp_rmt.files import write_atomically
from dp_rmt.reporting import machine

ONE_RUN_MUTATIONS = tuple(
    name for name in MUTATIONS if name not in ("padding counted", "noise reused on resume", *OF_USERS)
)
"""The one run cannot show two mistakes, and those of users are not made there. Padding that is counted concerns one
canary among the many. In full batches the canary is in every step, so that it cancels together with noise that is used
twice."""

EXAMPLES = 20
"""The number of examples in repeated runs."""
DELTA_OF_USERS = 0.05
"""Delta of the repeated runs of users. Two rows that are clipped apart double the shift, which some hundred runs can
show only of a mechanism that is calibrated to a large delta."""
MLP_EXAMPLES, MLP_WIDTH, MLP_HIDDEN = 500, 512, 8
SHARE, MLP_SHARE = 0.45, 0.1
"""The share of the canaries that is guessed to be in, and again to be out. Nearly all worst cases can be guessed; among
random examples only the extreme scores tell."""


def repeated_mechanism(
    epsilon: float, delta: float, mutation: str = "none", rows_per_user: int | None = None
) -> Audited:
    """A mechanism of twenty examples (or users), each sampled with probability 1/2 in each of 8 steps."""
    settings: Any = {"num_examples": EXAMPLES, "expected_batch_size": EXAMPLES / 2, "num_steps": 8}
    settings |= {"max_batch_size": EXAMPLES, "rows_per_user": rows_per_user}
    return _calibrated(epsilon, delta, mutation, settings)


def full_batch_mechanism(
    epsilon: float, delta: float, num_examples: int, num_steps: int, mutation: str = "none"
) -> Audited:
    """A mechanism with all examples in every step."""
    settings: Any = {"num_examples": num_examples, "expected_batch_size": float(num_examples), "num_steps": num_steps}
    settings["max_batch_size"] = num_examples
    return _calibrated(epsilon, delta, mutation, settings)


def audit_repeated(
    epsilon: float,
    *,
    delta: float,
    num_runs: int,
    seed: int,
    mutation: str = "none",
    rows_per_user: int | None = None,
) -> dict[str, Any]:
    """Audits many runs with one worst-case canary in or out; returns the row of a record.

    With `rows_per_user` the canary is a user with so many rows, all of which are in or out.
    """
    mechanism = repeated_mechanism(epsilon, delta, mutation, rows_per_user)
    claim = {"proven": epsilon, "delta": delta}
    name = "repeated runs" if rows_per_user is None else "repeated runs, users"
    return _timed(mechanism, name, claim, lambda: repeated_bound(mechanism, num_runs=num_runs, delta=delta, seed=seed))


def audit_one_run(
    epsilon: float, *, delta: float, num_canaries: int, seed: int, mutation: str = "none"
) -> dict[str, Any]:
    """Audits one run of the linear model with worst-case canaries; returns the row of a record."""
    mechanism = full_batch_mechanism(epsilon, delta, num_canaries, num_steps=4, mutation=mutation)
    flips = coin_flips(num_canaries, seed)
    rows, size = {"row": np.arange(num_canaries)}, min(500, num_canaries)
    run = OneRun(mechanism, canary_losses, canary_params(num_canaries), rows, microbatch_size=size)

    def bound() -> dict[str, Any]:
        scores = run.scores(flips, seed=seed, learning_rate=1.0)
        return one_run_bound(scores["gradient"], flips, share=SHARE, delta=delta)

    return _timed(mechanism, "one run, linear", {"proven": epsilon, "delta": delta}, bound)


def audit_mlp(epsilon: float, *, delta: float, seed: int, mutation: str = "none") -> list[dict[str, Any]]:
    """Audits one run of the MLP; returns the rows of white-box and of loss scores."""
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

    rows = [_timed(mechanism, f"one run, MLP, {name}", claim, functools.partial(bound, name)) for name in scores]
    return [row | {"seconds": seconds} for row in rows]


def audit(
    epsilon: float, *, mutations: bool, delta: float, num_runs: int, num_canaries: int, seed: int
) -> list[dict[str, Any]]:
    """Runs all audits of one proven epsilon; returns their rows."""
    names = tuple(MUTATIONS) if mutations else ("none",)
    rows = []
    for mutation in names:
        if mutation in ("none", *OF_USERS):
            of_users: dict[str, Any] = {"delta": DELTA_OF_USERS, "rows_per_user": 2}
            rows.append(audit_repeated(epsilon, num_runs=num_runs, seed=seed, mutation=mutation, **of_users))
        if mutation not in OF_USERS:
            rows.append(audit_repeated(epsilon, delta=delta, num_runs=num_runs, seed=seed, mutation=mutation))
        if mutation in ONE_RUN_MUTATIONS:
            one_run_delta = min(delta, 0.01 / num_canaries)
            rows.append(
                audit_one_run(epsilon, delta=one_run_delta, num_canaries=num_canaries, seed=seed, mutation=mutation)
            )
        if mutation in ("none", "noise removed"):
            rows += audit_mlp(epsilon, delta=delta, seed=seed, mutation=mutation)
    return rows


def write_records(
    folder: Path,
    epsilons: Iterable[float],
    *,
    mutations: bool,
    delta: float,
    num_runs: int,
    num_canaries: int,
    seed: int,
) -> list[str]:
    """Audits at every proven epsilon, writes a record of each, and prints its table.

    Args:
      folder: gets ``eps<EPSILON>_seed<SEED>.json``, with ``_mutations`` behind the seed where these are audited.
      epsilons: the proven epsilons.
      mutations: whether the code with mistakes in it is audited, too.
      delta: the delta of the guarantee; the linear model's one run takes at most ``0.01 / num_canaries``.
      num_runs: number of repeated runs with the canary, and again of those without it.
      num_canaries: canaries of the linear model's one run.
      seed: seed of coins, sampling and noise.

    Returns:
      The failures of the audits (`failures`); empty if all is well.
    """
    problems = []
    for epsilon in epsilons:
        rows = audit(epsilon, mutations=mutations, delta=delta, num_runs=num_runs, num_canaries=num_canaries, seed=seed)
        problems += failures(rows)
        record = {"proven": epsilon, "seed": seed, "machine": machine.description(), "rows": rows}
        name = f"eps{epsilon:g}_seed{seed}{'_mutations' if mutations else ''}.json"
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, json.dumps(record, indent=1) + "\n")
        print(f"{table(record)}\n", flush=True)
    return problems


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """The audits that failed: the right code came out above its epsilon, or no audit showed a mistake."""
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


def _rounded_down(bound: float) -> str:
    return f"{math.floor(100 * bound) / 100:.2f}"


def _calibrated(epsilon: float, delta: float, mutation: str, settings: dict[str, Any]) -> Audited:
    right = Audited.calibrated(epsilon=epsilon, delta=delta, l2_clip_norm=CLIP_NORM, **settings)
    assert isinstance(right, Audited)
    return dataclasses.replace(right, mutation=mutation)


def _audits(record: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["audit"] for row in record["rows"]))


def _timed(
    mechanism: Audited, audit: str, claim: dict[str, float], bound: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
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
