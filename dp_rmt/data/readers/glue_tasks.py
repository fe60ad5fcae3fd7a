"""The table of GLUE tasks, with all that differs from task to task: columns, labels, scores and prompts."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Infilling:
    """A classification task posed as text infilling (LM-BFF, Gao et al. 2021; privately Li et al. 2022).

    Attributes:
        template: holds `<mask>` once, and `<S>`, or `<S1>` and `<S2>`, where the texts go.
        label_words: the word that stands for each class at the mask, in the order of the class numbers.
    """

    template: str
    label_words: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class GlueTask:
    """What is particular to one GLUE task.

    Attributes:
        name: the task's name here and in configs.
        hub_name: its configuration name in the hub's `nyu-mll/glue`.
        text_columns: TSV columns of the one or two texts.
        hub_text_columns: the hub's names of the same columns.
        label_column: TSV column of the label.
        label_names: class names in the hub's order, in which the place is the class number; empty for regression.
        tsv_labels: how the TSV files write these classes, in the same order.
        metrics: the scores that GLUE reports, by their names in `scores`.
        infilling: prompt and label words; None if the task has no natural prompt.
        evaluation_names: the labelled evaluation splits. Split x is read from `x.tsv`.
        columns: all TSV columns of files without a header line; None if the file has a header.
        drop_malformed_rows: the published file has a few broken lines, which the hub's version drops as well.
    """

    name: str
    hub_name: str
    text_columns: tuple[str, ...]
    hub_text_columns: tuple[str, ...]
    label_column: str
    label_names: tuple[str, ...]
    tsv_labels: tuple[str, ...]
    metrics: tuple[str, ...]
    infilling: Infilling | None
    evaluation_names: tuple[str, ...] = ("dev",)
    columns: tuple[str, ...] | None = None
    drop_malformed_rows: bool = False

    @property
    def is_regression(self) -> bool:
        """True where the label is a score (STS-B)."""
        return not self.label_names

    @property
    def num_labels(self) -> int:
        """The number of the model's outputs, which is the number of classes, or 1 for a score."""
        return max(len(self.label_names), 1)


_TASKS = (
    GlueTask(
        name="sst2",
        hub_name="sst2",
        text_columns=("sentence",),
        hub_text_columns=("sentence",),
        label_column="label",
        label_names=("negative", "positive"),
        tsv_labels=("0", "1"),
        metrics=("accuracy",),
        infilling=Infilling("<S> It was <mask>.", ("terrible", "great")),
    ),
    GlueTask(
        name="qnli",
        hub_name="qnli",
        text_columns=("question", "sentence"),
        hub_text_columns=("question", "sentence"),
        label_column="label",
        label_names=("entailment", "not_entailment"),
        tsv_labels=("entailment", "not_entailment"),
        metrics=("accuracy",),
        infilling=Infilling("<S1>? <mask>, <S2>", ("Yes", "No")),
    ),
    GlueTask(
        name="qqp",
        hub_name="qqp",
        text_columns=("question1", "question2"),
        hub_text_columns=("question1", "question2"),
        label_column="is_duplicate",
        label_names=("not_duplicate", "duplicate"),
        tsv_labels=("0", "1"),
        metrics=("f1", "accuracy"),
        infilling=Infilling("<S1> <mask>, <S2>", ("No", "Yes")),
        drop_malformed_rows=True,
    ),
    GlueTask(
        name="mnli",
        hub_name="mnli",
        text_columns=("sentence1", "sentence2"),
        hub_text_columns=("premise", "hypothesis"),
        label_column="gold_label",
        label_names=("entailment", "neutral", "contradiction"),
        tsv_labels=("entailment", "neutral", "contradiction"),
        metrics=("accuracy",),
        infilling=Infilling("<S1>? <mask>, <S2>", ("Yes", "Maybe", "No")),
        evaluation_names=("dev_matched", "dev_mismatched"),
    ),
    GlueTask(
        name="rte",
        hub_name="rte",
        text_columns=("sentence1", "sentence2"),
        hub_text_columns=("sentence1", "sentence2"),
        label_column="label",
        label_names=("entailment", "not_entailment"),
        tsv_labels=("entailment", "not_entailment"),
        metrics=("accuracy",),
        infilling=Infilling("<S1>? <mask>, <S2>", ("Yes", "No")),
    ),
    GlueTask(
        name="mrpc",
        hub_name="mrpc",
        text_columns=("#1 String", "#2 String"),
        hub_text_columns=("sentence1", "sentence2"),
        label_column="Quality",
        label_names=("not_equivalent", "equivalent"),
        tsv_labels=("0", "1"),
        metrics=("f1", "accuracy"),
        infilling=Infilling("<S1> <mask>, <S2>", ("No", "Yes")),
    ),
    GlueTask(
        name="cola",
        hub_name="cola",
        text_columns=("sentence",),
        hub_text_columns=("sentence",),
        label_column="label",
        label_names=("unacceptable", "acceptable"),
        tsv_labels=("0", "1"),
        metrics=("matthews",),
        infilling=Infilling("<S> This is <mask>.", ("incorrect", "correct")),
        columns=("source", "label", "star", "sentence"),
    ),
    GlueTask(
        name="stsb",
        hub_name="stsb",
        text_columns=("sentence1", "sentence2"),
        hub_text_columns=("sentence1", "sentence2"),
        label_column="score",
        label_names=(),
        tsv_labels=(),
        metrics=("pearson", "spearman"),
        infilling=None,
    ),
)

GLUE_TASKS: dict[str, GlueTask] = {task.name: task for task in _TASKS}
