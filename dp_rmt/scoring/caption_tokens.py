"""Words as ROUGE-L, CIDEr and METEOR of the official E2E script count them: the Penn Treebank's without punctuation."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence

from dp_rmt.scoring.java import CaptionJars

# COCO's script takes these out. Brackets come out of the tokenizer in lower case ("-lrb-"), so they stay.
_PUNCTUATION = frozenset(["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", *".?!,:-;", "--", "..."])
_TIMEOUT_S = 600

_CURRENCY = str.maketrans({"£": "#", "€": "$"})  # the official tokenizer writes them so
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SPLIT_WORDS = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na"}
_ABBREVIATIONS = "mr mrs ms dr st jr sr vs inc ltd corp co mt ft gen col capt prof gov sen rep etc".replace(" ", "|")
_SUFFIX = r"'(?:s|m|d|re|ve|ll)(?!\w)"  # the second part of it's, they're
_LETTER = r"(?:(?!n't(?!\w))\w)"  # a letter or digit that does not begin the second part of don't
_TOKEN = re.compile(
    rf"""(?<!\w)(?:{_ABBREVIATIONS}|(?:[a-z]\.)*[a-z])\.(?!\w)         # mr.  u.s.  j.
    |n't(?!\w)|{_SUFFIX}
    |(?:(?<!\S)-)?\d+(?:[.,:/]\d+)+(?:-\w+)*                          # 3.5  1:02:38  100,000  1/2
    |(?:(?<!\S)-(?=\d))?{_LETTER}+(?:(?:[-/.&]|(?!{_SUFFIX})')(?=\w){_LETTER}+)*    # words, with hyphens inside
    |\S""",
    re.VERBOSE,
)


def official_caption_words(texts: Sequence[str], jars: CaptionJars) -> list[list[str]]:
    """Splits texts by the Stanford tokenizer, in lower case and without punctuation, as COCO's script does.

    Args:
        texts: N texts.
        jars: where Java's archives are.

    Returns:
        The words of each text.

    Raises:
        RuntimeError: Java failed.
    """
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jars.tokenizer)]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    # There is one text in each line, so line breaks of any kind within a text become spaces.
    lines = "\n".join(" ".join(text.split()) for text in texts)
    try:
        done = subprocess.run(command, input=lines.encode(), capture_output=True, check=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"The Stanford tokenizer failed: {error}. {getattr(error, 'stderr', b'')!r}") from error
    tokenized = done.stdout.decode().split("\n")[: len(texts)]
    if len(tokenized) < len(texts):
        raise RuntimeError(f"The Stanford tokenizer returned {len(tokenized)} lines for {len(texts)} texts.")
    return [[word for word in line.split() if word not in _PUNCTUATION] for line in tokenized]


def approximate_caption_words(texts: Sequence[str]) -> list[list[str]]:
    """Splits texts by regular expressions, without Java; for simple texts the words are the official ones.

    As with the Stanford tokenizer, words are in lower case, and words with hyphens stay whole. "don't" is "do", "n't",
    and "it's" is "it", "'s". Numbers keep their points. Percent and currency signs are words (a pound is "#"), and
    brackets are "-lrb-". Quotes and other punctuation are left out. The two differ on web addresses, rare abbreviations
    and unusual signs.

    >>> approximate_caption_words(["It isn't cheap (more than £20)."])
    [['it', 'is', "n't", 'cheap', '-lrb-', 'more', 'than', '#', '20', '-rrb-']]
    """
    return [_words(text) for text in texts]


def _words(text: str) -> list[str]:
    text = text.lower().translate(_CURRENCY).replace("’", "'").replace("&amp;", "&")
    words: list[str] = []
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in _BRACKETS:
            words.append(_BRACKETS[token])
        elif token in _SPLIT_WORDS:
            words += _SPLIT_WORDS[token].split()
        elif token not in _PUNCTUATION and token not in '"“”‘«»…–—':
            words.append(token)
    return words
