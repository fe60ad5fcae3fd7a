"""Was the advisor right? Its alarms beside what another learning rate did, over all records of the study.

    python -m experiments.studies.whitening.advisor --results=experiments/studies/whitening/results/sst2

`dp_rmt.reporting.advice` says that a run overshoots where more steps have a slope below -2 than chance explains. Every
pair of runs that differ in nothing but a factor of 2 in the learning rate tests that: the run overshot in truth if half
its rate ended better. Both runs are looked at up to the last step that both have reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from dp_rmt.finetuning import command_line
from dp_rmt.reporting.advice import OVERSHOT, alarm_from
from dp_rmt.reporting.records import learning_rate, markdown_table, read_records
from experiments.studies.methods.score import score_at

Record = dict[str, Any]


class Case(NamedTuple):
    """A run, and what half its learning rate did.

    Attributes:
      arm: name of the arm.
      rate: the learning rate of the run.
      num_steps: slopes that were measured.
      num_overshot: those below -2.
      gain: how much better half the rate ended, in accuracy or in training loss; above 0 where this rate is too high.
    """

    arm: str
    rate: float
    num_steps: int
    num_overshot: int
    gain: float

    @property
    def is_said_to_overshoot(self) -> bool:
        """What the advisor says."""
        return self.num_overshot >= alarm_from(self.num_steps)

    @property
    def rate_is_too_high(self) -> bool:
        """What the other run shows."""
        return self.gain > 0


def cases(records: Sequence[Record]) -> list[Case]:
    """All runs of which a run at half the rate is among the records, in the order of the records."""
    by_setting = {_setting(record, learning_rate(record["config"])): record for record in records}
    found = []
    for record in records:
        rate = learning_rate(record["config"])
        half = by_setting.get(_setting(record, rate / 2))
        if half is None:
            continue
        until = min(record["steps"], half["steps"])
        slopes = [slope for step, slope in record["advice/slope"] if step <= until]
        gain = score_at(half, until) - score_at(record, until)
        found.append(Case(record["arm"], rate, len(slopes), sum(slope < OVERSHOT for slope in slopes), gain))
    return found


def _setting(record: Record, rate: float) -> tuple[Any, ...]:
    """What two runs must share to be compared, and a rate, in digits that do not show how it was computed."""
    batch_size = record["config"]["privacy"]["expected_batch_size"]
    return record["arm"], batch_size, record["epsilon"], record["seed"], f"{rate:.5g}"


def contingency(found: Sequence[Case]) -> list[list[str]]:
    """The table of what was said against what was true: two rows, of alarms and of none, with counts."""
    rows = []
    for said, label in ((True, "the run overshoots"), (False, "it does not")):
        group = [case for case in found if case.is_said_to_overshoot == said]
        high = sum(case.rate_is_too_high for case in group)
        rows.append([label, str(high), str(len(group) - high)])
    return rows


def main(argv: list[str]) -> None:
    """Prints every case, and the table."""
    del argv
    found = cases([record for folder in flags.FLAGS.results for record in read_records(Path(folder))])
    rows = [(c.arm, f"{c.rate:g}", f"{c.num_overshot} of {c.num_steps}", f"{c.gain:+.3f}") for c in found]
    print(markdown_table(("arm", "learning rate", "overshot", "half the rate ends better by"), rows))
    print()
    print(markdown_table(("the advisor says", "half the rate was better", "it was not"), contingency(found)))


if __name__ == "__main__":
    flags.DEFINE_list("results", ["experiments/studies/whitening/results/sst2"], "Folders of records.")
    command_line.run(main)
