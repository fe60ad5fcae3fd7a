"""The audit of a run's settings: its noise, sampling and updates, attacked; the bound comes into its statement."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from dp_rmt.auditing.audits import EXAMPLES
from dp_rmt.auditing.engines import repeated_bound
from dp_rmt.auditing.problems import CLIP_NORM, Audited
from dp_rmt.reporting.audit_bound import AuditBound, write_audit
from dp_rmt.reporting.privacy_files import write_privacy
from dp_rmt.reporting.privacy_statement import PrivacyStatement, read_privacy
from dp_rmt.training.ledger import FILE as LEDGER
from dp_rmt.training.ledger import only_writer, read_ledger


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
