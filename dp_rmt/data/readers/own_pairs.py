"""Text from text of one's own: instructions and answers, prompts and completions, conversations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from dp_rmt.data.readers.rows import Row, text_of
from dp_rmt.data.readers.tables import ONLY_THE_SOURCE, Extras, Source, described, read_tables, shared_out
from dp_rmt.data.readers.text_pairs import Record, TextPairs, TextReferences, evaluation_rows, training_rows
from dp_rmt.data.readers.text_shapes import KNOWN, Shape, read_record, recognised


@dataclasses.dataclass(frozen=True)
class OwnPairs:
    """Rows of text from text.

    Attributes:
      train: the training pairs. Each pair is one example, the unit of privacy, and so is each conversation.
      evaluations: "dev" and "test", as far as there are rows; each source has all its references.
      notes: what was found, in sentences for the user.
    """

    train: TextPairs
    evaluations: Mapping[str, TextReferences]
    notes: tuple[str, ...]


def load_own_pairs(
    source: Source,
    shape: Shape | None = None,
    *,
    extras: Extras = ONLY_THE_SOURCE,
    max_train_examples: int | None = None,
    user_column: str | None = None,
) -> OwnPairs:
    """Reads text from text.

    Args:
      source: a file, a folder that holds ``train.SUFFIX``, or what else `read_tables` reads.
      shape: which columns hold what; None recognises it by their names.
      extras: where other splits come from.
      max_train_examples: keeps the first so many training pairs; None keeps all.
      user_column: the column of training rows that says whose they are; None if that is not read.

    Returns:
      An `OwnPairs`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a file is malformed, or its shape is not recognised; the message has file, line and cure.
    """
    tables = read_tables(source, extras)
    columns = list(dict.fromkeys(name for row in tables["train"].rows for name in row.fields))
    shape = shape or recognised(columns)
    if shape is None:
        raise ValueError(
            f"{described(source)}: the columns {', '.join(map(repr, columns))} are of no shape that is known. Name the "
            "columns by --config.data.source_column and target_column (or messages_column for conversations), or "
            f"rename them to one of: {KNOWN}"
        )
    records = {split: _records(table.rows, shape, is_train=split == "train") for split, table in tables.items()}
    if user_column is not None:
        named = zip(records["train"], tables["train"].rows, strict=True)
        records["train"] = [record._replace(user=text_of(row, user_column)) for record, row in named]
    if extras.dev_share is not None:
        records |= shared_out(records["train"], extras.dev_share, _prompt)
    unused = [name for name in shape.unused(columns) if name != user_column]
    notes = [f"text from text: {shape}" + (f"; not used: {', '.join(map(repr, unused))}" if unused else "")]
    return OwnPairs(
        train=training_rows(records.pop("train"))[slice(max_train_examples)],
        evaluations={split: evaluation_rows(rows, merge=True) for split, rows in records.items()},
        notes=tuple(notes),
    )


def _records(rows: Sequence[Row], shape: Shape, *, is_train: bool) -> list[Record]:
    records = [read_record(row, shape) for row in rows]
    # A test set may be published without answers, all of them.
    if is_train or any(record.references for record in records):
        for record in records:
            if not record.references:
                missing = "the assistant's last turn" if shape.messages else f"a text in column {shape.target!r}"
                raise ValueError(f"{record.where}: there is no answer. Add {missing}, or remove the row from the file")
    return records


def _prompt(record: Record) -> str:
    return "\n".join([*(turn.content for turn in record.history), record.source])
