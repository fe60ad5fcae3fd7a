"""The rows of a text-generation task: pairs to train on, and sources with all their references to evaluate on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple


class Turn(NamedTuple):
    """What one side of a conversation said."""

    role: Literal["system", "user", "assistant"]
    content: str


class Record(NamedTuple):
    """An entry of a file: a source, its references (a test set may have none), and where it stands.

    Of a conversation, `source` is what the user said last, and `history` is what was said before. `user` is the id of
    the person whose entry it is; empty if that is not known.
    """

    source: str
    references: tuple[str, ...]
    where: str
    history: tuple[Turn, ...] = ()
    user: str = ""


@dataclasses.dataclass(frozen=True)
class TextPairs:
    """Training rows. Each (source, target) pair is ONE example, the unit of privacy.

    A source with several references appears once for each of them, as several examples. The guarantee is for one text
    that somebody wrote, not for all the texts on one meaning representation.

    Attributes:
        sources: N linearised tables or instructions.
        targets: N texts.
        histories: of each row the turns before its source; empty if no row has any.
        places: where each row stands, for messages; may be empty.
        users: of each row the id of the person whose it is; empty if that is not known.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    histories: tuple[tuple[Turn, ...], ...] = ()
    places: tuple[str, ...] = dataclasses.field(default=(), compare=False, repr=False)
    users: tuple[str, ...] = dataclasses.field(default=(), compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, rows: slice) -> TextPairs:
        return TextPairs(
            self.sources[rows], self.targets[rows], self.histories[rows], self.places[rows], self.users[rows]
        )

    def place(self, row: int) -> str:
        """Where a row (counted from 0) stands, for a message."""
        return self.places[row] if self.places else f"row {row + 1}"


@dataclasses.dataclass(frozen=True)
class TextReferences:
    """Evaluation rows, one for each source, with all its references.

    Attributes:
        sources: N linearised tables or instructions, to generate one text for each.
        references: for each source its texts. All are empty for a test set that was published without references.
        histories: of each row the turns before its source; empty if no row has any.
        places: where each row stands, for messages; may be empty.
    """

    sources: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]
    histories: tuple[tuple[Turn, ...], ...] = ()
    places: tuple[str, ...] = dataclasses.field(default=(), compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, rows: slice) -> TextReferences:
        return TextReferences(self.sources[rows], self.references[rows], self.histories[rows], self.places[rows])

    @property
    def has_references(self) -> bool:
        """True if generated text can be scored."""
        return all(self.references)

    def pairs(self) -> TextPairs:
        """Makes one row of each (source, reference), as for training; it serves for the loss on this split.

        >>> TextReferences(("a", "b"), (("x", "y"), ("z",))).pairs()
        TextPairs(sources=('a', 'a', 'b'), targets=('x', 'y', 'z'), histories=())
        """
        histories = self.histories or ((),) * len(self)
        places = self.places or tuple(f"row {number}" for number in range(1, len(self) + 1))
        return training_rows(
            [Record(*row) for row in zip(self.sources, self.references, places, histories, strict=True)]
        )


def training_rows(records: Sequence[Record]) -> TextPairs:
    """Makes one pair of each (source, reference), in the order of the file.

    Raises:
        ValueError: an entry has no reference.

    >>> training_rows([Record("a", ("x", "y"), "entry 1")])
    TextPairs(sources=('a', 'a'), targets=('x', 'y'), histories=())
    """
    for record in records:
        if not record.references:
            raise ValueError(f"{record.where}: there is no text to train on for the source {record.source!r}.")
    flat = [(record, reference) for record in records for reference in record.references]
    return TextPairs(
        sources=tuple(record.source for record, _ in flat),
        targets=tuple(reference for _, reference in flat),
        histories=_histories([record for record, _ in flat]),
        places=tuple(record.where for record, _ in flat),
        users=tuple(record.user for record, _ in flat if record.user),
    )


def evaluation_rows(records: Sequence[Record], *, merge: bool) -> TextReferences:
    """Makes one row of each entry, or one of each distinct source with the references of all its entries.

    Args:
        records: entries of a file.
        merge: True if entries with the same source (and history) are references of one test item (E2E). False if each
            entry is a test item of its own (DART's official evaluation counts its 5,097 entries, some of which are
            equal).

    >>> evaluation_rows([Record("a", ("x",), ""), Record("b", ("y",), ""), Record("a", ("z",), "")], merge=True)
    TextReferences(sources=('a', 'b'), references=(('x', 'z'), ('y',)), histories=())
    """
    rows = list(records)
    if merge:
        grouped: dict[tuple[str, tuple[Turn, ...]], Record] = {}
        for record in records:
            first = grouped.setdefault((record.source, record.history), record._replace(references=()))
            grouped[record.source, record.history] = first._replace(references=first.references + record.references)
        rows = list(grouped.values())
    return TextReferences(
        sources=tuple(record.source for record in rows),
        references=tuple(record.references for record in rows),
        histories=_histories(rows),
        places=tuple(record.where for record in rows),
    )


def _histories(records: Sequence[Record]) -> tuple[tuple[Turn, ...], ...]:
    return tuple(record.history for record in records) if any(record.history for record in records) else ()
