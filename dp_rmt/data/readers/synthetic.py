"""The project's own labelled text, reviews written by a probabilistic grammar, so that no download is needed.

A review has one to three clauses. Each clause praises or blames an aspect, in plain words or by negating
the opposite ("was not tasty at all"); a contrast ("although the soup was bland , the staff was lovely") takes
the sentiment of its later clause. The label therefore follows from the words and their order, never from one keyword,
and there is no label noise. The public and the private part share the grammar and most words. They differ in their
topics.
"""

from __future__ import annotations

import os
import pathlib
import random
from collections.abc import Callable, Container, Sequence
from typing import Literal, TypeVar

from dp_rmt.data.readers import synthetic_words as words

_T = TypeVar("_T")
Domain = Literal["public", "private"]


def generate_reviews(
    num_examples: int, seed: int, *, domain: Domain, exclude: Container[str] = ()
) -> list[tuple[str, int]]:
    """Generates distinct labelled reviews. The same arguments give the same reviews on every machine.

    Args:
        num_examples: how many reviews; the grammar has millions.
        seed: any integer. Each domain has a stream of its own.
        domain: "public" (films, restaurants, books, hotels) or "private" (mostly gadgets, games, courses and
            concerts).
        exclude: reviews that may not appear.

    Returns:
        Pairs (review, label). Label 1 is positive, and both labels are equally likely.

    Raises:
        ValueError: the domain is unknown, or the number of examples is negative.

    >>> generate_reviews(1, 0, domain="public") == generate_reviews(2, 0, domain="public")[:1]
    True
    """
    if domain not in words.TOPIC_WEIGHTS:
        raise ValueError(f"domain must be one of {sorted(words.TOPIC_WEIGHTS)}, got {domain!r}.")
    if num_examples < 0:
        raise ValueError(f"num_examples must not be negative, got {num_examples}.")
    writer = _Writer(random.Random(f"{domain} {seed}"), words.TOPIC_WEIGHTS[domain])
    reviews: dict[str, int] = {}
    while len(reviews) < num_examples:
        review, label = writer.review()
        if review not in exclude:
            reviews.setdefault(review, label)
    return list(reviews.items())


def write_corpus(
    folder: str | os.PathLike[str],
    *,
    num_public: int,
    num_private_train: int,
    num_private_dev: int,
    seed: int,
) -> pathlib.Path:
    """Writes `public.tsv`, `train.tsv` and `dev.tsv` in the GLUE layout of SST-2.

    No review is in two of the three files.

    Args:
        folder: where the files go; it is made if needed.
        num_public: labelled public reviews, for pre-training.
        num_private_train: labelled private reviews to train on.
        num_private_dev: labelled private reviews to evaluate on.
        seed: the seed of everything.

    Returns:
        The folder. `load_glue("sst2", path=folder)` reads the private files, and `read_tsv` reads the public one.

    Raises:
        ValueError: a number of reviews is below 1.
    """
    if min(num_public, num_private_train, num_private_dev) < 1:
        raise ValueError(
            f"Each part of a corpus needs at least one review, got num_public={num_public},"
            f" num_private_train={num_private_train}, num_private_dev={num_private_dev}."
        )
    private = generate_reviews(num_private_train + num_private_dev, seed, domain="private")
    public = generate_reviews(num_public, seed, domain="public", exclude=dict(private))
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"public": public, "train": private[:num_private_train], "dev": private[num_private_train:]}
    for name, part in parts.items():
        rows = [f"{review}\t{label}" for review, label in part]
        _write_lines(folder / f"{name}.tsv", ["sentence\tlabel", *rows])
    return folder


def _write_lines(file: pathlib.Path, lines: Sequence[str]) -> None:
    file.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


class _Writer:
    """Draws reviews from the grammar. All randomness comes from one stream of uniform numbers."""

    def __init__(self, rng: random.Random, topic_weights: dict[str, float]) -> None:
        self._rng = rng
        self._topic_weights = topic_weights
        self._topic = words.TOPICS["film"]

    def review(self) -> tuple[str, int]:
        """One review and its label."""
        self._topic = words.TOPICS[self._weighted(self._topic_weights)]
        positive = self._chance(0.5)
        form: Callable[[bool], str] = self._weighted({self._single: 0.4, self._agreement: 0.4, self._contrast: 0.2})
        return f"{form(positive)} {self._pick(('.', '.', '.', '!'))}", int(positive)

    def _single(self, positive: bool) -> str:
        return f"{self._setting()} {self._pick((',', ', and', '.'))} {self._clause(positive)}"

    def _agreement(self, positive: bool) -> str:
        clauses = [self._clause(positive) for _ in range(2 + self._chance(0.2))]
        if len(clauses) == 2 and self._chance(0.2):
            clauses.insert(0, self._setting())
        return f"{' , '.join(clauses[:-1])} {self._pick(('and', ', and', '. also ,', ';'))} {clauses[-1]}"

    def _contrast(self, positive: bool) -> str:
        """Two opposite clauses, of which the later one is the verdict."""
        first, later = self._clause(not positive), self._clause(positive)
        opening = self._pick(("although", "though", "while", "even if", "granted that"))
        linking = self._pick((", but", ", yet", ". still ,", ". however ,", "; nevertheless"))
        contrast = f"{opening} {first} , {later}" if self._chance(0.5) else f"{first} {linking} {later}"
        return f"{self._setting()} . {contrast}" if self._chance(0.1) else contrast

    def _setting(self) -> str:
        """A clause without sentiment."""
        thing = self._thing()
        return self._pick(
            (
                f"{self._pick(words.PEOPLE)} {self._pick(words.EXPERIENCED)} {thing} {self._when()}",
                f"this is about {thing} that {self._pick(words.PEOPLE)} {self._pick(words.EXPERIENCED)}",
                f"{self._when()} {self._pick(words.PEOPLE)} {self._pick(words.EXPERIENCED)} {thing}",
            )
        )

    def _clause(self, positive: bool) -> str:
        """A clause with a sentiment, in plain words or by negating the opposite."""
        if self._chance(0.15):
            return self._negated(positive)
        aspect, praise = self._aspect(), self._adjective(positive)
        verb, _ = self._pick(words.PRAISE_VERBS if positive else words.BLAME_VERBS)
        change = self._pick(words.ADVANCED if positive else words.DECLINED)
        judged = f"{self._pick(words.INTENSIFIERS)} {praise}" if self._chance(0.4) else praise
        article = "an" if judged[0] in "aeiou" else "a"
        return self._weighted(
            {
                f"{aspect} {self._pick(words.LINKING_VERBS)} {judged}": 5,
                f"{self._pick(words.PEOPLE)} {verb} {aspect}": 2,
                f"it had {article} {judged} {self._pick(self._topic.aspects)}": 2,
                f"{aspect} was much {change} than expected": 1,
            }
        )

    def _negated(self, positive: bool) -> str:
        aspect, opposite = self._aspect(), self._adjective(not positive)
        _, verb = self._pick(words.BLAME_VERBS if positive else words.PRAISE_VERBS)
        return self._weighted(
            {
                f"{aspect} was not {opposite} at all": 3,
                f"{aspect} was never {opposite}": 1,
                f"{aspect} was hardly {opposite}": 1,
                f"nothing about {aspect} was {opposite}": 1,
                f"{self._pick(words.PEOPLE)} did not {verb} {aspect}": 2,
                f"nobody could call {aspect} {opposite}": 1,
            }
        )

    def _adjective(self, positive: bool) -> str:
        own, shared = (self._topic.praise, words.PRAISE) if positive else (self._topic.blame, words.BLAME)
        return self._pick(own if self._chance(0.4) else shared)

    def _aspect(self) -> str:
        return f"{self._pick(('the', 'the', 'the', 'its', 'their'))} {self._pick(self._topic.aspects)}"

    def _thing(self) -> str:
        neutral = f"{self._pick(words.NEUTRAL)} " if self._chance(0.6) else ""
        return f"{self._pick(('the', 'this', 'that'))} {neutral}{self._pick(self._topic.things)}"

    def _when(self) -> str:
        return self._pick(self._topic.occasions if self._chance(0.5) else words.TIMES)

    def _chance(self, probability: float) -> bool:
        return self._rng.random() < probability

    def _pick(self, choices: Sequence[_T]) -> _T:
        # This is not random.choice, because Python promises the same stream in later versions for random() alone.
        return choices[int(self._rng.random() * len(choices))]

    def _weighted(self, weights: dict[_T, float]) -> _T:
        place = self._rng.random() * sum(weights.values())
        for choice, weight in weights.items():
            place -= weight
            if place < 0:
                return choice
        return choice
