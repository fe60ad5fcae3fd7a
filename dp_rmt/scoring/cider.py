"""CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726), which COCO's caption evaluation and the E2E script call "CIDEr"."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

_MAX_ORDER = 4
_SIGMA = 6.0  # width of the penalty on a difference in length, in words

Words = Sequence[str]
Ngram = tuple[str, ...]


def cider(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """Ten times the mean similarity of the tf-idf vectors of n-grams, n = 1 to 4, of a text and its references.

    For each order n and each reference,  sum_w min(h_w, r_w) r_w / (|h| |r|) * exp(-(l_h - l_r)^2 / (2 sigma^2)),
    sigma = 6, with  h_w = count(w) log(N / df(w))  and df the number of the N reference sets with w (at least 1);
    then comes the mean over orders, references and hypotheses. As in COCO's script, l is the number of 2-grams. The
    score depends on the whole set: with N = 1 every weight is log 1 = 0.

    Args:
        hypotheses: N tokenised texts.
        references: for each of them at least one tokenised text.

    Returns:
        The score in [0, 10].

    >>> round(cider([["a", "b", "c", "d"], ["x"]], [[["a", "b", "c", "d"]], [["y"]]]), 4)
    5.0
    """
    frequency: Counter[Ngram] = Counter()
    for texts in references:
        frequency.update({ngram for words in texts for ngram in _ngrams(words)})
    log_size = math.log(len(references))
    scores = []
    for hypothesis, texts in zip(hypotheses, references, strict=True):
        vector = _Vector(hypothesis, frequency, log_size)
        similarities = [vector.similarity(_Vector(words, frequency, log_size)) for words in texts]
        scores.append(10 * sum(similarities) / len(similarities))
    return sum(scores) / len(scores)


class _Vector:
    """The tf-idf weights of one text's n-grams, their norm for each order, and its number of 2-grams."""

    def __init__(self, words: Words, frequency: Counter[Ngram], log_size: float):
        counts = Counter(_ngrams(words))
        self.weights = {w: n * (log_size - math.log(max(frequency[w], 1))) for w, n in counts.items()}
        squares = [0.0] * (_MAX_ORDER + 1)
        for ngram, weight in self.weights.items():
            squares[len(ngram)] += weight**2
        self.norms = [math.sqrt(square) for square in squares]
        self.length = max(len(words) - 1, 0)

    def similarity(self, reference: _Vector) -> float:
        """The similarity to one reference, a mean over the orders."""
        products = [0.0] * (_MAX_ORDER + 1)
        for ngram, weight in self.weights.items():
            other = reference.weights.get(ngram, 0.0)
            products[len(ngram)] += min(weight, other) * other
        cosines = 0.0
        for order in range(1, _MAX_ORDER + 1):
            norm = self.norms[order] * reference.norms[order]
            cosines += products[order] / norm if norm else 0.0
        return cosines / _MAX_ORDER * math.exp(-((self.length - reference.length) ** 2) / (2 * _SIGMA**2))


def _ngrams(words: Words) -> Iterator[Ngram]:
    for order in range(1, _MAX_ORDER + 1):
        yield from zip(*(words[start:] for start in range(order)), strict=False)
