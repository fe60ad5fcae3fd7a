"""Was the advisor right? Its alarms beside what its remedies did, over all records of the study.

    python -m experiments.studies.whitening.advisor --results=experiments/studies/whitening/results/sst2

`dp_rmt.reporting.advice` says that a run overshoots where more steps have a slope below -2 than chance explains. It
then advises whitening and averages, and half the learning rate where two fifths of the steps do so. Each has a test:

- whitening: the whitened run of the same cell and seed beside DP-Adam's, each at its best rate;
- averages: the average of the iterates beside the last one of the same run;
- half the rate: a run that differs in nothing else. Both are compared at the last step that both have reached.

The advisor was right where a remedy helped that it advised, and where one did not help that it did not advise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from dp_rmt.finetuning import command_line
from dp_rmt.reporting.advice import OVERSHOT, TOO_FAST, alarm_from
from dp_rmt.reporting.records import learning_rate, markdown_table, read_records
from experiments.studies.methods.score import score_at
from experiments.studies.whitening.table import BASELINES, best_runs, by_cell

Record = dict[str, Any]
HALF_RATE, WHITENING, AVERAGE = "half the learning rate", "whitening", "the average of the iterates"


class Case(NamedTuple):
    """A run, and what a remedy against overshooting did.

    Attributes:
      remedy: one of the three.
      arm: name of the arm.
      rate: the learning rate of the run.
      num_steps: slopes that were measured.
      num_overshot: those below -2.
      gain: how much better the remedy ended, in accuracy or in loss.
    """

    remedy: str
    arm: str
    rate: float
    num_steps: int
    num_overshot: int
    gain: float

    @property
    def is_advised(self) -> bool:
        """What the advisor says: half the rate behind more steps that overshot than the other remedies."""
        least = TOO_FAST * self.num_steps if self.remedy == HALF_RATE else 0
        return self.num_overshot >= max(alarm_from(self.num_steps), least)

    @property
    def remedy_helps(self) -> bool:
        """What the other run shows."""
        return self.gain > 0


def cases(records: Sequence[Record]) -> list[Case]:
    """All runs whose remedy is among the records, too, remedy by remedy."""
    return [*_half_rates(records), *_whitened(records), *_averaged(records)]


def _half_rates(records: Sequence[Record]) -> Iterator[Case]:
    """Every pair of runs that differ by a factor of 2 in the learning rate alone."""
    by_setting = {_setting(record, learning_rate(record["config"])): record for record in records}
    for record in records:
        half = by_setting.get(_setting(record, learning_rate(record["config"]) / 2))
        if half is not None:
            yield _compared(HALF_RATE, record, half)


def _whitened(records: Sequence[Record]) -> Iterator[Case]:
    """DP-Adam at its best rate and the whitened run of the same cell and seed."""
    groups = by_cell(records)
    for (batch, epsilon, arm), runs in groups.items():
        whitened = {run["seed"]: run for run in best_runs(groups.get((batch, epsilon, "whitened"), []))}
        if arm in BASELINES:
            for run in best_runs(runs):
                if run["seed"] in whitened:
                    yield _compared(WHITENING, run, whitened[run["seed"]])


def _averaged(records: Sequence[Record]) -> Iterator[Case]:
    """Every run's last iterate and its average, where the run ended."""
    for record in records:
        for key, sign in (("accuracy", 1), ("loss", -1)):
            if record[key] and record.get(f"{key}_of_last_iterate"):
                gain = sign * (record[key][-1][1] - record[f"{key}_of_last_iterate"][-1][1])
                yield _case(AVERAGE, record, record["steps"], gain)
                break


def _compared(remedy: str, record: Record, other: Record) -> Case:
    until = min(record["steps"], other["steps"])
    return _case(remedy, record, until, score_at(other, until) - score_at(record, until))


def _case(remedy: str, record: Record, until: int, gain: float) -> Case:
    slopes = [slope for step, slope in record["advice/slope"] if step <= until]
    overshot = sum(slope < OVERSHOT for slope in slopes)
    return Case(remedy, record["arm"], learning_rate(record["config"]), len(slopes), overshot, gain)


def _setting(record: Record, rate: float) -> tuple[Any, ...]:
    """What two runs must share to be compared, and a rate, in digits that do not show how it was computed."""
    batch_size = record["config"]["privacy"]["expected_batch_size"]
    return record["arm"], batch_size, record["epsilon"], record["seed"], f"{rate:.5g}"


def contingency(found: Sequence[Case]) -> list[list[str]]:
    """What was said against what was true: a row for each remedy and answer, with counts."""
    rows = []
    for remedy in dict.fromkeys(case.remedy for case in found):
        of_remedy = [case for case in found if case.remedy == remedy]
        right = sum(case.is_advised == case.remedy_helps for case in of_remedy)
        for said, label in ((True, "yes"), (False, "no")):
            group = [case for case in of_remedy if case.is_advised == said]
            helped = sum(case.remedy_helps for case in group)
            answer = f"{right} of {len(of_remedy)}" if said else ""
            rows.append([remedy, label, str(helped), str(len(group) - helped), answer])
    return rows


def main(argv: list[str]) -> None:
    """Prints every case, and the table."""
    del argv
    found = [case for folder in flags.FLAGS.results for case in cases(read_records(Path(folder)))]
    rows = [(c.remedy, c.arm, f"{c.rate:g}", f"{c.num_overshot} of {c.num_steps}", f"{c.gain:+.3f}") for c in found]
    print(markdown_table(("remedy", "arm", "learning rate", "overshot", "it gains"), rows))
    print()
    print(markdown_table(("remedy", "is advised", "it helped", "it did not", "right"), contingency(found)))


if __name__ == "__main__":
    flags.DEFINE_list("results", ["experiments/studies/whitening/results/sst2"], "Folders of records.")
    command_line.run(main)
