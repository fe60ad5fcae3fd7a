"""NIST (Doddington 2002), as mteval-v13a computes it in the E2E challenge's official script."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

MAX_ORDER = 5
# With this beta the length penalty is 1/2 where the hypotheses have two thirds of the references' words.
_BETA = -math.log(0.5) / math.log(1.5) ** 2

Words = Sequence[str]


def nist(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """NIST-5 counts n-grams that are in a reference, each weighted by what its last word tells after the others.

    sum_{n=1}^{5} ( sum of info(w_1..w_n) over matched n-grams / number of n-grams in the hypotheses )
    * exp(-beta log^2 min(1, L_hyp / L_ref)),   info(w_1..w_n) = log2( count(w_1..w_{n-1}) / count(w_1..w_n) ),

    with counts over all references. A match is clipped at the most that one reference has (Doddington 2002;
    mteval-v13a.pl). Where segments differ in the number of references, the official script (tuetschek/e2e-metrics)
    takes L_ref = all reference words / mean number of references per segment, and so does this function. The script's
    Python version (and nltk's) differ in this from the script, and from the published numbers.

    Args:
        hypotheses: N tokenised texts.
        references: for each of them at least one tokenised text.

    Returns:
        The score. It is at least 0, and not bounded by 1.

    >>> round(nist([["a", "b"]], [[["a", "b"], ["a", "c"]]]), 4)
    2.5
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for texts in references:
        for words in texts:
            counts.update(_ngrams(words))
    num_words = sum(len(words) for texts in references for words in texts)
    information, totals = [0.0] * (MAX_ORDER + 1), [0] * (MAX_ORDER + 1)
    for hypothesis, texts in zip(hypotheses, references, strict=True):
        found = Counter(_ngrams(hypothesis))
        most: Counter[tuple[str, ...]] = Counter()
        for words in texts:
            most |= Counter(_ngrams(words))
        for ngram, count in (found & most).items():
            # mteval-v13a takes the history "0" for no history, as "0" is false in Perl. That is kept, to agree with it.
            history = counts[ngram[:-1]] if len(ngram) > 1 and ngram[:-1] != ("0",) else num_words
            information[len(ngram)] += count * math.log2(history / counts[ngram])
        for order in range(1, MAX_ORDER + 1):
            totals[order] += max(len(hypothesis) - order + 1, 0)
    num_references = sum(map(len, references))
    ratio = totals[1] * num_references / (num_words * len(references)) if num_words else 0.0
    penalty = math.exp(-_BETA * math.log(min(ratio, 1.0)) ** 2) if ratio else 0.0
    return penalty * sum(value / max(total, 1) for value, total in zip(information, totals, strict=True))


def _ngrams(words: Words) -> Iterator[tuple[str, ...]]:
    for order in range(1, MAX_ORDER + 1):
        yield from zip(*(words[start:] for start in range(order)), strict=False)
