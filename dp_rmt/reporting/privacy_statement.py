"""The privacy statement of a run: the numbers that it rests on, as `privacy.json` and as the rows of a table."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from dp_rmt.random_bits import NoiseGenerator
from dp_rmt.reporting.audit_bound import AuditBound
from dp_rmt.reporting.numbers import Rounding, align, number
from dp_rmt.reporting.provenance import Provenance
from dp_rmt.types import Unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacyStatement:
    """The numbers of a run that its privacy statement rests on.

    Attributes:
      epsilon: spent by the updates done so far; None for a run that is not private.
      target_epsilon: what the noise was calibrated for at the end of the run; None if the noise was given.
      delta: the delta of every epsilon here; a run that is not private may have None.
      epsilon_pld: epsilon spent, by privacy loss distributions; None if not computed.
      epsilon_rdp: epsilon spent, by Renyi divergences; None if not computed.
      noise_multiplier: std of the noise in the sum of clipped gradients, over l2_clip_norm.
      l2_clip_norm: bound on the l2 norm of one example's gradient; infinite without clipping.
      clip: style of clipping, "flat" or "automatic".
      sampling_probability: probability with which a step uses an example.
      expected_batch_size: sampling_probability times num_examples.
      max_batch_size: largest number of examples that a step uses; a larger sample is cut at random.
      num_steps: updates done; an upper bound if `is_upper_bound`.
      num_examples: examples in the training set.
      noise_std: std of the noise in one entry of the averaged gradient; of correlated noise the largest of all steps.
      seeds_from: where the seeds of sampling and noise come from.
      nonprivate_metrics: whether raw values (loss, norms, ...) were written to the metrics file.
      evaluation_data: names of the data sets that the run was evaluated on.
      audit: lower bound on epsilon from an attack; None if no audit was run.
      is_upper_bound: whether the run is under way, or was ended without being able to say how far it came.
      detection: pairs (false-alarm rate, detection rate) of the mechanism's own trade-off curve. The second is the
        largest share of present examples that a test with that false-alarm rate can detect; empty if not computed.
      delta_of_truncation: the part of delta that pays for the finite support of the noise and, where noise is
        correlated, for batches that overflow; None if not known.
      texts_of: the evaluation data whose rows stand verbatim in `texts.jsonl` and the report; None if there are none.
      coordinates_from: the rows from which the coordinates of clipping and updates were computed, and which must be
        public; None if there are no such coordinates.
      selected_among: distribution of the secret number of runs of which this one was chosen as the best, in words; None
        if it was not chosen, so that the numbers are those of one run.
      clip_quantile: the quantile of the gradients' norms that the clip norm follows from l2_clip_norm on, and the share
        of the budget that this takes; None for a fixed clip norm. noise_std is then in units of the clip norm.
      compares_raw_losses: whether the run is one of those whose raw training losses are compared, to choose by them.
      evaluation_guarantee: (epsilon, delta, std of the noise in a count, number of scores) of each row of each
        evaluation data, whose accuracies have noise; None if scores have none.
      about: model, task, data and code; None if not known.
      date: when the last of these updates was announced or done; None if not known.
      unit: what every number counts, and whose guarantee it is: an example's, or a user's with all rows.
      rows_per_user: the most rows of a user that a step takes; None where the unit is an example.
      noise_generator: what the bits of the noise come from, as in `dp_rmt.random_bits`.
      noise_coefficients: the bands of the strategy matrix where the noise of different steps is correlated, and as many
        groups of examples take turns; None for independent noise.
    """

    epsilon: float | None
    target_epsilon: float | None
    delta: float | None
    epsilon_pld: float | None
    epsilon_rdp: float | None
    noise_multiplier: float
    l2_clip_norm: float
    clip: str
    sampling_probability: float
    expected_batch_size: float
    max_batch_size: int
    num_steps: int
    num_examples: int
    noise_std: float
    seeds_from: Literal["os entropy", "given in the config"]
    nonprivate_metrics: bool
    evaluation_data: tuple[str, ...] = ()
    audit: AuditBound | None = None
    is_upper_bound: bool = False
    detection: tuple[tuple[float, float], ...] = ()
    delta_of_truncation: float | None = None
    texts_of: str | None = None
    coordinates_from: str | None = None
    selected_among: str | None = None
    clip_quantile: tuple[float, float] | None = None
    compares_raw_losses: bool = False
    evaluation_guarantee: tuple[float, float, float, int] | None = None
    about: Provenance | None = None
    date: str | None = None
    unit: Unit = "example"
    rows_per_user: int | None = None
    noise_generator: NoiseGenerator = "threefry2x32"
    noise_coefficients: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.seeds_from not in ("os entropy", "given in the config"):
            raise ValueError(
                f"seeds_from must be 'os entropy' or 'given in the config', got {self.seeds_from!r}: "
                "the statement warns readers of seeds that others may know"
            )
        if self.is_private and (self.delta is None or not 0 < self.delta < 1):
            raise ValueError(
                f"epsilon={self.epsilon} with delta={self.delta}: an epsilon means nothing without its "
                "delta, which must be in (0, 1)"
            )
        object.__setattr__(self, "evaluation_data", tuple(self.evaluation_data))
        if self.noise_coefficients is not None:
            object.__setattr__(self, "noise_coefficients", tuple(self.noise_coefficients))
        object.__setattr__(self, "detection", tuple((rate, power) for rate, power in self.detection))

    @property
    def is_private(self) -> bool:
        """Whether there is any guarantee at all."""
        return self.epsilon is not None and math.isfinite(self.epsilon)

    @property
    def num_groups(self) -> int:
        """In how many groups the examples take turns; 1 where every step draws from all of them."""
        return 1 if self.noise_coefficients is None else len(self.noise_coefficients)

    @property
    def unit_in_words(self) -> str:
        """Whose guarantee it is. A person's it is only where users are the unit."""
        return "one training example" if self.unit == "example" else "one person, with all rows of the person"

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> PrivacyStatement:
        """The statement in the content of a `privacy.json`.

        Fields with a default may be missing, because files of earlier versions lack them.

        Raises:
          ValueError: a field without a default is missing.
        """
        fields = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(cls)}
        if missing := {name for name, required in fields.items() if required} - record.keys():
            raise ValueError(
                f"not a privacy statement: {', '.join(sorted(missing))} missing; pass the whole content of privacy.json"
            )
        values: dict[str, Any] = {name: record[name] for name in fields if name in record}
        if values.get("audit") is not None:
            values["audit"] = AuditBound.from_json(values["audit"])
        if values.get("about") is not None:
            values["about"] = Provenance.from_json(values["about"])
        infinite = {"l2_clip_norm": math.inf} if values["l2_clip_norm"] is None else {}
        return cls(**(values | infinite))

    def to_json(self) -> dict[str, Any]:
        """The content of `privacy.json`: the fields and what they mean; infinity becomes null."""
        fields = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in dataclasses.asdict(self).items()
        }
        return {
            "is_private": self.is_private,
            "unit_of_privacy": self.unit_in_words,
            "neighboring_relation": "add or remove one",
            "sampling": "Poisson, truncated to max_batch_size"
            if self.num_groups == 1
            else f"cyclic Poisson from {self.num_groups} groups, truncated to max_batch_size",
            "released": "the sequence of noisy gradients, and so every model computed from it",
            **fields,
            "evaluation_data": list(self.evaluation_data),
            "detection": [list(point) for point in self.detection],
        }


def read_privacy(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a run's `privacy.json`.

    Args:
      workdir: the run's folder.

    Returns:
      What `PrivacyStatement.to_json` gave.

    Raises:
      FileNotFoundError: the folder has no privacy statement.
      ValueError: the file is not JSON.
    """
    path = Path(workdir) / "privacy.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: this folder holds no run that has begun") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): run the job again to have it rewritten") from error


def statement_table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """The privacy statements of one or several runs for the terminal: a row per quantity, a column per run.

    Args:
      runs: name -> content of `privacy.json`; at least one.

    Returns:
      Aligned lines. What does not apply to a run is a dash.
    """
    statements = {name: PrivacyStatement.from_json(record) for name, record in runs.items()}
    columns = [dict(table_rows(statement)) for statement in statements.values()]
    verdicts = ["private" if statement.is_private else "NOT private" for statement in statements.values()]
    quantities = dict.fromkeys(name for column in sorted(columns, key=len, reverse=True) for name in column)
    units = {statement.unit_in_words for statement in statements.values()}
    rows = [["", *statements]]
    if len(units) > 1:
        rows += [["unit", *(statement.unit_in_words for statement in statements.values())]]
    rows += [["the unit" if len(units) > 1 else units.pop(), *verdicts]]
    rows += [[name, *(column.get(name, "–") for column in columns)] for name in quantities]
    return align(rows)


def table_rows(statement: PrivacyStatement) -> list[tuple[str, str]]:
    """The numbers of the statement as (name, value), formatted; what does not apply is left out.

    Upper bounds are rounded up, and lower bounds down.
    """
    bounds: list[tuple[str, float | None, Rounding]] = [
        ("ε spent", statement.epsilon, "up"),
        ("ε by privacy loss distributions (PLD)", statement.epsilon_pld, "up"),
        ("ε by Rényi divergences (RDP)", statement.epsilon_rdp, "up"),
        ("ε aimed at", statement.target_epsilon, "up"),
        ("δ", statement.delta, "up"),
        ("δ for the end of the noise's support", statement.delta_of_truncation, "up"),
        ("ε, lower bound by an audit", statement.audit.epsilon if statement.audit else None, "down"),
    ]
    common: list[tuple[str, Any]] = [
        ("noise multiplier", statement.noise_multiplier),
        ("clip norm", _clip_norm(statement)),
        ("noise std of one gradient entry", statement.noise_std),
        *([("bands of correlated noise", statement.num_groups)] if statement.num_groups > 1 else []),
        ("sampling probability", statement.sampling_probability),
        ("expected batch size", statement.expected_batch_size),
        ("largest batch size", statement.max_batch_size),
        ("updates done, at most" if statement.is_upper_bound else "updates done", statement.num_steps),
        (f"training {statement.unit}s", statement.num_examples),
        *([("rows of a user in one step, at most", statement.rows_per_user)] if statement.rows_per_user else []),
        ("seeds", statement.seeds_from),
        ("evaluated on", ", ".join(statement.evaluation_data) or "nothing"),
    ]
    rows = [(name, number(value, rounding)) for name, value, rounding in bounds if value is not None]
    given = [(name, value if isinstance(value, str) else number(value)) for name, value in common]
    return (rows if statement.is_private else []) + given


def _clip_norm(statement: PrivacyStatement) -> str:
    if statement.clip_quantile is None:
        return f"{number(statement.l2_clip_norm)} ({statement.clip})"
    return f"from {number(statement.l2_clip_norm)} on, by the {number(statement.clip_quantile[0])}-quantile"
