"""The options of data: `config.data`, and the names of tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal, get_args

from dp_rmt.finetuning.options import NOT_NEGATIVE, POSITIVE, Check, Group, option

GlueTaskName = Literal["sst2", "qnli", "qqp", "mnli", "rte", "mrpc", "cola", "stsb"]
TextTaskName = Literal["e2e", "dart"]
DocumentTaskName = Literal["customersim", "documents"]
OwnTaskName = Literal["auto", "labelled_table", "text_pairs"]
CAUSAL_TASKS = (*get_args(TextTaskName), "text_pairs", *get_args(DocumentTaskName))
"""The tasks of a decoder."""
PUBLISHED_TASKS = (*get_args(GlueTaskName), *get_args(TextTaskName))
"""The tasks whose data the hub has, for everybody."""
OWN_TASKS = ("labelled_table", "text_pairs", "documents")
"""The tasks of one's own data."""
OF_OWN_TASKS = ("dev_path", "test_path", "dev_share", "regression", "source_column", "target_column", "messages_column")
"""The options that published data has no use for."""
SensitiveKind = Literal["attributes", "spans", "numbers", "codes", "emails", "dates", "presidio"]

HUB = "hub:"
"""What stands before the name of a data set on the hub."""
SHARE = Check("be above 0 and below 1", lambda x: 0 < x < 1)
LENGTHS = Check("be positive lengths in tokens", lambda lengths: all(length > 0 for length in lengths))
PACKING = (
    "texts are not packed into one sequence. A sequence is one example, the unit of privacy: in a packed one several "
    "people's texts would share one clip norm, and one text more or less would shift all sequences after it, which the "
    "guarantee does not cover. Short texts cost little here: config.data.length_groups splits a batch by length. Leave "
    "the option out"
)


@dataclasses.dataclass(frozen=True)
class Data(Group):
    """What is trained on."""

    WHERE: ClassVar[str] = "config.data"
    REFUSED: ClassVar[Mapping[str, str]] = dict.fromkeys(("packing", "packed", "pack"), PACKING)
    task: GlueTaskName | OwnTaskName | TextTaskName | DocumentTaskName = option(
        "sst2",
        "A task of GLUE; labelled_table: labelled text of one's own; text_pairs: text from text of one's own; e2e, "
        "dart: text from tables; customersim, documents: text as it is; auto: what the columns of one's own data say.",
    )
    path: str | None = option(
        None,
        "Folder with the data's own files; None takes those of a published task from the hub. One's own data may also "
        "be a file (CSV, TSV, JSON, JSON Lines, Parquet), a folder of `datasets`, or hub:NAME.",
    )
    dev_path: str | None = option(None, "Of one's own data: a file of rows to evaluate on while training.")
    test_path: str | None = option(None, "Of one's own data: a file of rows to evaluate on.")
    dev_share: float | None = option(
        None,
        "Of one's own data: evaluates on this share of the training rows, which a hash of their text chooses.",
        SHARE,
    )
    text_columns: tuple[str, ...] = option(
        ("text",), "Of labelled_table: the columns of the text, or of both texts. Of documents: that of the text."
    )
    label_column: str = option("label", "Of labelled_table: the column of the label.")
    labels: tuple[str, ...] = option(
        (), "Of labelled_table: names of all classes. Empty: those in the training rows, which then become public."
    )
    regression: bool = option(False, "Of labelled_table: labels are numbers to be predicted, and not classes.")
    drop_labels: tuple[str, ...] = option(
        (), "Leaves out all rows with one of these labels, such as MNLI's '-'. The rows that are kept are protected."
    )
    source_column: str | None = option(None, "Of text_pairs: the column of the prompt; None recognises it.")
    target_column: str | None = option(None, "Of text_pairs: the column of the text to learn; None recognises it.")
    messages_column: str | None = option(None, "Of text_pairs: the column of whole conversations; None recognises it.")
    prompt_format: Literal["auto", "template", "separator"] = option(
        "auto",
        "How prompt and answer are put together: by the tokenizer's chat template, or with a separator between. auto: "
        "the template for text_pairs, if there is one.",
    )
    user_column: str | None = option(
        None,
        "The column that says whose a training row is: the unit of privacy is then a person with all rows. source in "
        "e2e and dart; in customersim a column of its database, such as name. None: the unit is a row.",
    )
    train_split: Literal["train", "dev"] = option(
        "train", "The split trained on; dev where DART's train file is not to be had. For e2e and dart alone."
    )
    cache_dir: str = option("~/.cache/dp_rmt", "Folder of tokenised data.")
    max_length: int = option(64, "Longest text in tokens; longer ones are cut.", POSITIVE)
    length_groups: tuple[int, ...] = option(
        (16, 32), "Shorter lengths, in tokens, that a batch is split into beside max_length.", LENGTHS
    )
    max_train_examples: int | None = option(None, "Trains on the first so many rows; None: on all.", POSITIVE)
    skip_lines: int = option(0, "Leaves out the first so many lines of each dialogue of customersim.", NOT_NEGATIVE)
    max_eval_documents: int | None = option(
        None, "Evaluates on the first so many documents of each split; None: on all.", POSITIVE
    )
    sensitive: tuple[SensitiveKind, ...] = option(
        (), "What is sensitive in documents; attributes are CustomerSim's database, spans come in files."
    )
