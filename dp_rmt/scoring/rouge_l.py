"""ROUGE-L (Lin 2004), as the COCO caption evaluation and the E2E challenge's official script compute it."""

from __future__ import annotations

from collections.abc import Sequence

_BETA = 1.2

Words = Sequence[str]


def rouge_l(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """The mean over the hypotheses of F_beta, beta = 1.2, from the longest common subsequence (LCS).

    F = (1 + beta^2) P R / (R + beta^2 P), where P = max over references of LCS / len(hypothesis) and
    R = max over references of LCS / len(reference), each maximum by itself (COCO's choice).

    Args:
        hypotheses: N tokenised texts.
        references: for each of them at least one tokenised text.

    Returns:
        The score in [0, 1].

    >>> rouge_l([["a", "b", "c"]], [[["a", "c"], ["a", "b", "c"]]])
    1.0
    """
    scores = []
    for hypothesis, texts in zip(hypotheses, references, strict=True):
        common = [_longest_common_subsequence(hypothesis, words) for words in texts]
        # A text without words has length 1 in COCO's script. Its score is 0 either way.
        precision = max(common) / max(len(hypothesis), 1)
        recall = max(length / max(len(words), 1) for length, words in zip(common, texts, strict=True))
        total = recall + _BETA**2 * precision
        scores.append((1 + _BETA**2) * precision * recall / total if total else 0.0)
    return sum(scores) / len(scores)


def _longest_common_subsequence(a: Words, b: Words) -> int:
    """The length, with one bit for each word of `a` (Hyyrö 2004). A zero bit in `row` marks a step of the length."""
    positions: dict[str, int] = {}
    for place, word in enumerate(a):
        positions[word] = positions.get(word, 0) | 1 << place
    mask = (1 << len(a)) - 1
    row = mask
    for word in b:
        matches = row & positions.get(word, 0)
        row = ((row + matches) | (row - matches)) & mask
    return len(a) - row.bit_count()
