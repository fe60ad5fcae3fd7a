"""The privacy statement of a run, in plain words: what is guaranteed, to whom, and what is not.

Written beside the model as `privacy.json` (for programs) and `privacy.md` (for people).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from dp_rmt.training.metrics import write_atomically
from dp_rmt.training.privacy_audit import AuditBound
from dp_rmt.training.privacy_text import align, number, sections


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacyStatement:
    """The numbers of a run that its privacy statement rests on.

    Attributes:
      epsilon: spent by the updates done so far; None for a run that is not private.
      target_epsilon: what the noise was calibrated for at the end of the run; None if the noise was given.
      delta: the delta of every epsilon here; None for a run that is not private.
      epsilon_pld: spent, by privacy loss distributions; None if not computed.
      epsilon_rdp: spent, by Renyi divergences; None if not computed.
      noise_multiplier: std of the noise in the sum of clipped gradients, over l2_clip_norm.
      l2_clip_norm: bound on the l2 norm of one example's gradient; infinite without clipping.
      clip: style of clipping, "flat" or "automatic".
      sampling_probability: probability with which a step uses an example.
      expected_batch_size: sampling_probability times num_examples.
      max_batch_size: largest number of examples that a step uses; a larger sample is cut at random.
      num_steps: updates done.
      num_examples: examples in the training set.
      noise_std: std of the noise in one entry of the averaged gradient.
      seeds_from: where the seeds of sampling and noise come from.
      nonprivate_metrics: whether raw values (loss, norms, ...) were written to the metrics file.
      evaluation_data: names of the data sets that the run was evaluated on.
      audit: lower bound on epsilon from an attack; None if no audit was run.
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

    @property
    def is_private(self) -> bool:
        """Whether there is any guarantee at all."""
        return self.epsilon is not None and math.isfinite(self.epsilon)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> PrivacyStatement:
        """The statement in the content of a `privacy.json`.

        Raises:
          ValueError: a field is missing.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if missing := names - record.keys() - {"audit"}:  # statements were written before there were audits
            raise ValueError(
                f"not a privacy statement: {', '.join(sorted(missing))} missing; pass the whole content of "
                "privacy.json"
            )
        values: dict[str, Any] = {name: record.get(name) for name in names}
        if values["audit"] is not None:
            values["audit"] = AuditBound.from_json(values["audit"])
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
            "unit_of_privacy": "one training example",
            "neighboring_relation": "add or remove one",
            "sampling": "Poisson, truncated to max_batch_size",
            "released": "the sequence of noisy gradients, and so every model computed from it",
            **fields,
            "evaluation_data": list(self.evaluation_data),
        }


def write_privacy(workdir: str | os.PathLike[str], statement: PrivacyStatement) -> None:
    """Writes `privacy.json` and `privacy.md` into a run's folder, each replaced atomically.

    Args:
      workdir: the run's folder; made if missing.
      statement: its numbers at this point of the run.
    """
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(statement.to_json(), indent=2, allow_nan=False)
    write_atomically(folder / "privacy.json", text + "\n")
    write_atomically(folder / "privacy.md", markdown(statement))


def markdown(statement: PrivacyStatement) -> str:
    """The statement as a page of Markdown, the content of `privacy.md`."""
    parts = ["# Privacy statement"]
    for heading, paragraphs in sections(statement):
        parts += [f"## {heading}", "\n".join(f"- {text}" for text in paragraphs)]
    rows = "\n".join(f"| {name} | {value} |" for name, value in table_rows(statement))
    return "\n\n".join([*parts, "## Numbers", f"| quantity | value |\n|:--|--:|\n{rows}"]) + "\n"


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
    quantities = max(columns, key=len)
    rows = [["", *statements], ["one training example", *verdicts]]
    rows += [[name, *(column.get(name, "–") for column in columns)] for name in quantities]
    return align(rows)


def table_rows(statement: PrivacyStatement) -> list[tuple[str, str]]:
    """The numbers of the statement as (name, value), formatted; what does not apply is left out."""
    private: list[tuple[str, Any]] = [
        ("ε spent", statement.epsilon),
        ("ε by privacy loss distributions (PLD)", statement.epsilon_pld),
        ("ε by Rényi divergences (RDP)", statement.epsilon_rdp),
        ("ε aimed at", statement.target_epsilon),
        ("δ", statement.delta),
        ("ε, lower bound by an audit", statement.audit.epsilon if statement.audit else None),
    ]
    common: list[tuple[str, Any]] = [
        ("noise multiplier", statement.noise_multiplier),
        ("clip norm", f"{number(statement.l2_clip_norm)} ({statement.clip})"),
        ("noise std of one gradient entry", statement.noise_std),
        ("sampling probability", statement.sampling_probability),
        ("expected batch size", statement.expected_batch_size),
        ("largest batch size", statement.max_batch_size),
        ("updates done", statement.num_steps),
        ("training examples", statement.num_examples),
        ("seeds", statement.seeds_from),
        ("evaluated on", ", ".join(statement.evaluation_data) or "nothing"),
    ]
    rows = (private if statement.is_private else []) + common
    given = [(name, value) for name, value in rows if value is not None]
    return [(name, value if isinstance(value, str) else number(value)) for name, value in given]
