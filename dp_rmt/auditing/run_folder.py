"""The audit of a run's settings: it attacks its noise, sampling and updates, and puts the bound into its statement."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import cast

from dp_rmt.auditing.audits import EXAMPLES
from dp_rmt.auditing.engines import repeated_bound
from dp_rmt.auditing.problems import CLIP_NORM, Audited
from dp_rmt.clipping.per_example import ClippingStyle
from dp_rmt.clipping.quantile import QuantileClipping
from dp_rmt.reporting.audit_bound import AuditBound, write_audit
from dp_rmt.reporting.privacy_files import write_privacy
from dp_rmt.reporting.privacy_statement import PrivacyStatement, read_privacy
from dp_rmt.training.ledger import FILE as LEDGER
from dp_rmt.training.ledger import only_writer, read_ledger


def audit_workdir(workdir: Path, *, num_runs: int, seed: int, confidence: float = 0.95) -> AuditBound:
    """Audits the code with a run's mechanism and updates, and puts the bound into its statement.

    The mechanism is the run's, with its noise, sampling, unit and way of clipping, but for the clip norm. It attacks
    repeated runs of twenty examples. The run itself is not attacked, because the canaries would have to be in its data.

    Args:
      workdir: folder of a private run; gets ``audit.json``, and privacy.json and privacy.md with the bound.
      num_runs: number of runs with the canary, and again without it; the bound cannot exceed about ln of this number.
      seed: seed of sampling and noise.
      confidence: of the bound.

    Returns:
      The bound.

    Raises:
      FileNotFoundError: there is no run.
      ValueError: the run is not private, has correlated noise or has done no update, or its statement is broken or
        older than its ledger.
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
    if statement.num_groups > 1:
        raise ValueError(
            f"{workdir}: the noise of this run is correlated over its steps, and the attack here is on independent "
            "noise: it would say nothing of this run"
        )
    mechanism = Audited(
        num_examples=EXAMPLES,
        expected_batch_size=EXAMPLES * statement.sampling_probability,
        num_steps=statement.num_steps,
        noise_multiplier=statement.noise_multiplier,
        l2_clip_norm=CLIP_NORM,
        clip=cast(ClippingStyle, statement.clip),
        max_batch_size=EXAMPLES,
        rows_per_user=statement.rows_per_user,
        clip_quantile=statement.clip_quantile and QuantileClipping(*statement.clip_quantile),
        noise_generator=statement.noise_generator,
    )
    found = repeated_bound(mechanism, num_runs=num_runs, delta=statement.delta, seed=seed, confidence=confidence)
    counted = "examples" if mechanism.rows_per_user is None else f"users with {mechanism.rows_per_user} rows each"
    bound = AuditBound(
        epsilon=found["epsilon"],
        delta=statement.delta,
        confidence=confidence,
        is_this_run=False,
        subject=f"{2 * num_runs:,} repeated runs of {EXAMPLES} {counted}, one a worst-case canary that is in or out",
        noise_multiplier=statement.noise_multiplier,
        sampling_probability=statement.sampling_probability,
        num_steps=statement.num_steps,
    )
    write_audit(workdir, bound)
    alone = only_writer(workdir) if (workdir / LEDGER).exists() else contextlib.nullcontext()
    with contextlib.suppress(BlockingIOError), alone:  # a run that is training writes its statement with this bound
        now = PrivacyStatement.from_json(read_privacy(workdir))  # the run may have gone on and spent more
        write_privacy(workdir, dataclasses.replace(now, audit=bound))
    return bound
