"""The rows of a text-generation task: pairs to train on, and sources with all their references to evaluate on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Record(NamedTuple):
    """An entry of a file: a source, its references (a test set may have none), and where it stands."""

    source: str
    references: tuple[str, ...]
    where: str


@dataclasses.dataclass(frozen=True)
class TextPairs:
    """Training rows. Each (source, target) pair is ONE example, the unit of privacy.

    A source with several references appears once for each of them, as several examples. The guarantee is for one text
    that somebody wrote, not for all the texts on one meaning representation.

    Attributes:
        sources: N linearised tables or instructions.
        targets: N texts.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, rows: slice) -> TextPairs:
        return TextPairs(self.sources[rows], self.targets[rows])


@dataclasses.dataclass(frozen=True)
class TextReferences:
    """Evaluation rows, one for each source, with all its references.

    Attributes:
        sources: N linearised tables or instructions, to generate one text for each.
        references: for each source its texts. All are empty for a test set that was published without references.
    """

    sources: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, rows: slice) -> TextReferences:
        return TextReferences(self.sources[rows], self.references[rows])

    @property
    def has_references(self) -> bool:
        """True if generated text can be scored."""
        return all(self.references)

    def pairs(self) -> TextPairs:
        """Makes one row of each (source, reference), as for training; it serves for the loss on this split.

        >>> TextReferences(("a", "b"), (("x", "y"), ("z",))).pairs()
        TextPairs(sources=('a', 'a', 'b'), targets=('x', 'y', 'z'))
        """
        return _pairs(zip(self.sources, self.references, strict=True))


def training_rows(records: Sequence[Record]) -> TextPairs:
    """Makes one pair of each (source, reference), in the order of the file.

    Raises:
        ValueError: an entry has no reference.

    >>> training_rows([Record("a", ("x", "y"), "entry 1")])
    TextPairs(sources=('a', 'a'), targets=('x', 'y'))
    """
    for record in records:
        if not record.references:
            raise ValueError(f"{record.where}: there is no text to train on for the source {record.source!r}.")
    return _pairs((record.source, record.references) for record in records)


def evaluation_rows(records: Sequence[Record], *, merge: bool) -> TextReferences:
    """Makes one row of each entry, or one of each distinct source with the references of all its entries.

    Args:
        records: entries of a file.
        merge: True if entries with the same source are references of one test item (E2E). False if each entry is a test
            item of its own (DART's official evaluation counts its 5,097 entries, some of which are equal).

    >>> evaluation_rows([Record("a", ("x",), ""), Record("b", ("y",), ""), Record("a", ("z",), "")], merge=True)
    TextReferences(sources=('a', 'b'), references=(('x', 'z'), ('y',)))
    """
    if not merge:
        return TextReferences(tuple(r.source for r in records), tuple(r.references for r in records))
    grouped: dict[str, tuple[str, ...]] = {}
    for record in records:
        grouped[record.source] = grouped.get(record.source, ()) + record.references
    return TextReferences(tuple(grouped), tuple(grouped.values()))


def _pairs(rows: Iterable[tuple[str, Sequence[str]]]) -> TextPairs:
    flat = [(source, reference) for source, references in rows for reference in references]
    return TextPairs(tuple(source for source, _ in flat), tuple(target for _, target in flat))
