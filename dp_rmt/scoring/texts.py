"""BLEU, NIST, METEOR, ROUGE-L and CIDEr of generated text, as the field reports them for E2E and DART."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from absl import logging

from dp_rmt.extras import extra
from dp_rmt.scoring.caption_tokens import approximate_caption_words, official_caption_words
from dp_rmt.scoring.cider import cider
from dp_rmt.scoring.java import CaptionJars, find_caption_jars
from dp_rmt.scoring.meteor import meteor
from dp_rmt.scoring.nist import nist
from dp_rmt.scoring.rouge_l import rouge_l

Words = list[str]


def text_scores(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], *, use_java: bool | None = None
) -> dict[str, float | str]:
    """Computes the scores of the E2E challenge's official script (tuetschek/e2e-metrics), in its units.

    BLEU is sacrebleu's, with mteval-v13a's tokens, lower case, all references and the closest length. NIST has the same
    tokens. ROUGE-L, CIDEr and METEOR have the Penn Treebank's tokens without punctuation, in lower case. They come from
    the official tokenizer if Java and `pycocoevalcap` (the extra `meteor`) are installed, else from an approximation by
    regular expressions. METEOR itself needs both.

    Args:
        hypotheses: N generated texts. An empty text is scored as it is.
        references: for each hypothesis its reference texts, at least one.
        use_java: None uses the official tokenizer and METEOR if they are installed. False does without them, because
            METEOR takes seconds for its tables and its start. True demands them.

    Returns:
        `bleu`, `rouge_l` in [0, 1], `nist`, `cider` in [0, 10] and, with Java, `meteor` in [0, 1]. `tokenizer` is "ptb"
        or "approximate" and says in which words ROUGE-L and CIDEr were counted.

    Raises:
        ValueError: there are no hypotheses, lengths differ, or a hypothesis has no references.
        RuntimeError: `use_java` is True, and Java or `pycocoevalcap` is missing or fails.

    >>> references = [["The Eagle is a cheap pub.", "A pub, the Eagle."]]
    >>> scores = text_scores(["The Eagle is a pub."], references, use_java=False)
    >>> round(scores["bleu"], 4), round(scores["rouge_l"], 4), scores["tokenizer"]
    (0.6389, 0.8944, 'approximate')
    """
    _check(hypotheses, references)
    jars = None if use_java is False else find_caption_jars()
    if use_java and jars is None:
        raise RuntimeError("Java or the package `pycocoevalcap` is missing: install both, or leave use_java unset.")
    hypotheses = [" ".join(text.split()) for text in hypotheses]
    references = [[" ".join(text.split()) for text in texts] for texts in references]
    scores: dict[str, float | str] = {"bleu": _bleu(hypotheses, references)}
    scores["nist"] = nist(*_tokenized(_words_13a, hypotheses, references))
    if jars is not None:
        try:
            return scores | _caption_scores(hypotheses, references, jars)
        except RuntimeError as error:
            if use_java:
                raise
            logging.warning("%s Scoring without METEOR and with approximate tokens.", error)
    return scores | _caption_scores(hypotheses, references, None)


def _caption_scores(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], jars: CaptionJars | None
) -> dict[str, float | str]:
    if jars is None:
        words = _tokenized(approximate_caption_words, hypotheses, references)
    else:
        words = _tokenized(lambda texts: official_caption_words(texts, jars), hypotheses, references)
    scores: dict[str, float | str] = {
        "rouge_l": rouge_l(*words),
        "cider": cider(*words),
        "tokenizer": "approximate" if jars is None else "ptb",
    }
    return scores if jars is None else scores | {"meteor": meteor(*words, jars)}


def _check(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if isinstance(hypotheses, str) or any(isinstance(texts, str) for texts in references):
        raise ValueError("hypotheses must be a list of texts, and references a list of lists of texts.")
    if len(hypotheses) != len(references) or not hypotheses:
        raise ValueError(
            f"There are {len(hypotheses)} hypotheses and {len(references)} lists of references; there must be as many"
            " of both, at least one. Generate one text for each source."
        )
    for number, texts in enumerate(references, start=1):
        if not texts or not all(text.strip() for text in texts):
            raise ValueError(
                f"Hypothesis {number} has {'an empty reference' if texts else 'no references'}, so it cannot be scored."
                " A test set without references is for generation only: take the file with references."
            )


def _bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    with extra("finetune"):
        from sacrebleu.metrics import BLEU  # imported here, because that takes as long as importing NumPy

    most = max(map(len, references))
    # None stands for a missing reference: sacrebleu knows it, though its annotations do not.
    columns: list[Any] = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    # `force` avoids a warning about text that ends in " ."
    return BLEU(tokenize="13a", lowercase=True, force=True).corpus_score(hypotheses, columns).score / 100


def _words_13a(texts: Sequence[str]) -> list[Words]:
    with extra("finetune"):
        from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenize = Tokenizer13a()
    return [tokenize(text.lower()).split() for text in texts]


def _tokenized(
    tokenize: Callable[[Sequence[str]], list[Words]], hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[Words], list[list[Words]]]:
    """Tokenises all texts in one call, because a call may start a program."""
    words = iter(tokenize([*hypotheses, *(text for texts in references for text in texts)]))
    return [next(words) for _ in hypotheses], [[next(words) for _ in texts] for texts in references]
