"""Classification as text infilling: in `<S> It was <mask>.` the word at the mask is the class.

The method is that of Gao et al. 2021 (LM-BFF, arXiv 2012.15723). Li et al. 2022 (arXiv 2110.05679) found that it helps
private fine-tuning, because the masked-LM head needs no training from scratch.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from dp_rmt.data.readers.glue import Examples
from dp_rmt.data.readers.glue_tasks import Infilling
from dp_rmt.data.tokens.token_rows import special_tokens


def label_word_ids(tokenizer: Any, infilling: Infilling) -> np.ndarray:
    """Finds the token of each class's label word as it stands after a space (a byte-level BPE has " great").

    Args:
        tokenizer: a fast tokenizer of `transformers`.
        infilling: prompt and label words.

    Returns:
        Token ids (num_labels,), int32. The masked-LM logits at these tokens are the class logits.

    Raises:
        ValueError: a word is not exactly one token of the vocabulary, or two words are the same token.
    """
    ids: list[int] = []
    for word in infilling.label_words:
        tokens = _encode(tokenizer, f" {word}")
        if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
            pieces = tokenizer.convert_ids_to_tokens(tokens)
            raise ValueError(
                f"The label word {word!r} must be one token of the vocabulary of {tokenizer.name_or_path!r},"
                f" but is {pieces}. Choose another word, or use the classification head instead of text"
                " infilling."
            )
        if tokens[0] in ids:
            raise ValueError(
                f"The label word {word!r} is the same token as"
                f" {infilling.label_words[ids.index(tokens[0])]!r}: two classes would get the same logit."
                " Choose another word."
            )
        ids += tokens
    return np.asarray(ids, np.int32)


def infilling_rows(
    examples: Examples, tokenizer: Any, infilling: Infilling, *, max_length: int
) -> tuple[list[list[int]], list[int], int]:
    """Writes each example into the prompt, piece by piece, so that only its texts can be cut.

    Args:
        examples: N text rows.
        tokenizer: a fast tokenizer with a mask token.
        infilling: the prompt.
        max_length: longest row, special tokens included.

    Returns:
        N lists of token ids (not padded), the N positions of the mask token, and how many rows were cut.

    Raises:
        ValueError: there is no mask token, the template does not fit the texts, or `max_length` has no room for text.
    """
    _check_mask_token(tokenizer)
    columns = [examples.texts] if examples.text_pairs is None else [examples.texts, examples.text_pairs]
    names = ["S"] if examples.text_pairs is None else ["S1", "S2"]
    prefix, suffix = special_tokens(tokenizer)
    texts: dict[str, list[list[int]]] = {}
    prompt: list[str | list[int]] = []  # "S", "S1", "S2", "mask", and the tokens of what stands between them
    space = ""
    for piece in _split_template(infilling.template, names):
        if piece in names:
            column = columns[names.index(piece)]
            texts[piece] = _encode(tokenizer, [space + text for text in column])
        literal = piece.rstrip()
        if piece in names or piece == "mask":
            prompt.append(piece)
            space = ""
        else:
            # A space before a text belongs to the text's first token (byte-level BPE); before the mask it
            # vanishes.
            prompt.append(_encode(tokenizer, literal) if literal else [])
            space = piece[len(literal) :]
    num_fixed = len(prefix) + len(suffix) + 1 + sum(len(part) for part in prompt if isinstance(part, list))
    room = max_length - num_fixed
    if room < len(names):
        raise ValueError(
            f"max_length={max_length} has no room for text: the prompt {infilling.template!r} and special"
            f" tokens take {num_fixed} tokens. Raise max_length."
        )
    rows, mask_positions, num_truncated = [], [], 0
    for texts_of_row in zip(*texts.values(), strict=True):
        lengths = [len(ids) for ids in texts_of_row]
        num_truncated += sum(lengths) > room
        cut = [ids[:length] for ids, length in zip(texts_of_row, _fit(lengths, room), strict=True)]
        filled = dict(zip(texts, cut, strict=True)) | {"mask": [tokenizer.mask_token_id]}
        row = list(prefix)
        for part in prompt:
            if part == "mask":
                mask_positions.append(len(row))
            row += filled[part] if isinstance(part, str) else part
        rows.append(row + suffix)
    return rows, mask_positions, num_truncated


def _check_mask_token(tokenizer: Any) -> None:
    if tokenizer.mask_token_id is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no mask token, which text infilling needs. Use a"
            " masked language model such as RoBERTa or BERT, or the classification head."
        )


def _fit(lengths: list[int], room: int) -> list[int]:
    """Cuts the longest first until the lengths sum to at most `room`.

    >>> _fit([9, 3], 8), _fit([9, 9], 8), _fit([2, 3], 8)
    ([5, 3], [4, 4], [2, 3])
    """
    lengths = list(lengths)
    if len(lengths) == 1 or sum(lengths) <= room:
        return [min(length, room) for length in lengths]
    first, second = lengths
    if first > second:
        first = max(room - second, (room + 1) // 2)
        return [first, room - first]
    second = max(room - first, room // 2)
    return [room - second, second]


def _split_template(template: str, names: list[str]) -> list[str]:
    """Splits a template into its literal pieces, text names and "mask", in order.

    >>> _split_template("<S1>? <mask>, <S2>", ["S1", "S2"])
    ['S1', '? ', 'mask', ', ', 'S2']
    """
    pieces = re.split(r"<(S1|S2|S|mask)>", template)
    if sorted(pieces[1::2]) != sorted([*names, "mask"]):
        wanted = ", ".join(f"<{name}>" for name in [*names, "mask"])
        raise ValueError(f"The template {template!r} must hold each of {wanted} once, and no other text.")
    return [piece for piece in pieces if piece]


def _encode(tokenizer: Any, text: str | list[str]) -> Any:
    """Token ids without special tokens. `verbose=False` avoids a warning of long rows, which are cut later."""
    return tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
