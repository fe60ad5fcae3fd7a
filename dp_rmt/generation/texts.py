"""Continues all the prompts of a data set, in batches of a few fixed shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dp_rmt.generation.generate import generate
from dp_rmt.generation.methods import Method
from dp_rmt.types import Params


def generate_texts(
    module: Any,
    params: Params,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    method: Method,
    *,
    batch_size: int,
    prompt_lengths: Sequence[int],
    mesh: Mesh | None = None,
    done: Collection[int] = (),
) -> Iterator[tuple[int, str]]:
    """Continues each prompt of a data set. The rows come as they are done, so that they can be kept and resumed from.

    Apart from the rounding of sums, a row's continuation depends neither on its batch nor on what is done already.

    Args:
        module: a `CausalLanguageModel`.
        params: its parameters.
        tokenizer: the model's tokenizer, with an end token. It needs no padding token, because the mask says what is
          padding.
        prompts: texts, which are tokenised by the tokenizer's own rules; or their token ids.
        method: `Greedy`, `Beam` or `Sampling`. If it has no eos_token_id, it gets the tokenizer's.
        batch_size: rows of a batch, a multiple of the mesh's devices. The last batch of each length is filled up.
        prompt_lengths: lengths to pad to. Each prompt is padded to the least length that holds it, and there is a
            program for each length. The longest prompts have their own length if none of these holds them.
        mesh: batches are divided over its devices.
        done: numbers of the rows to leave out.

    Returns:
        An iterator of (row number, text), the longest prompts first; text without special tokens.

    Raises:
        ValueError: a prompt is empty, or too long for the model together with its continuation; the tokenizer has no
            end token, or more tokens than the model; the batch size does not fit. It is raised before anything is
            generated.
    """
    limit = module.config.max_position_embeddings
    method = _with_end_token(method, tokenizer)
    devices = 1 if mesh is None else mesh.size
    if batch_size < 1 or batch_size % devices:
        raise ValueError(f"batch_size {batch_size} on {devices} device(s); give a multiple of {devices}")
    if len(tokenizer) > module.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model {module.config.vocab_size}; use the tokenizer "
            "of the model's own folder"
        )
    rows = {
        row: tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        for row, prompt in enumerate(prompts)
        if row not in set(done)
    }
    for row, ids in rows.items():
        _check_prompt(row, len(ids), method.max_new_tokens, limit)
    if mesh is not None:
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    groups = _by_length(rows, prompt_lengths, limit - method.max_new_tokens)

    def texts() -> Iterator[tuple[int, str]]:
        for length, members in groups:
            for start in range(0, len(members), batch_size):
                chosen = members[start : start + batch_size]
                ids_BxL, mask_BxL, rows_B = _batch(rows, chosen, batch_size, length)
                generated = generate(module, params, ids_BxL, mask_BxL, method, rows_B=rows_B, mesh=mesh)
                tokens_BxT, lengths_B = np.asarray(generated.tokens_BxT), np.asarray(generated.lengths_B)
                _check_scores(chosen, np.asarray(generated.scores_B))
                for row, tokens_T, count in zip(chosen, tokens_BxT, lengths_B):
                    yield row, _text(tokenizer, tokens_T[:count])

    return texts()


def _check_scores(rows: Sequence[int], scores_B: np.ndarray) -> None:
    """Raises if a row was written by logits that are not numbers, of which the largest would be token 0."""
    wrong = [row for row, score in zip(rows, scores_B) if np.isnan(score)]
    if wrong:
        raise ValueError(
            f"the logits of {len(wrong)} texts are NaN, the first for the prompt of row {wrong[0]}: the model has "
            "diverged, or its dtype is too narrow; there is no text to write"
        )


def _with_end_token(method: Method, tokenizer: Any) -> Method:
    if method.eos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(
            "neither the method nor the tokenizer has an end token, without which no text ends; give the method the "
            "eos_token_id that the model was trained to end a text with"
        )
    if method.eos_token_id is None:
        method = dataclasses.replace(method, eos_token_id=tokenizer.eos_token_id)
    return method


def _check_prompt(row: int, length: int, max_new_tokens: int, limit: int) -> None:
    if length == 0:
        raise ValueError(f"the prompt of row {row} has no token; begin it with one, such as the tokenizer's bos_token")
    if length > limit:
        raise ValueError(
            f"the prompt of row {row} has {length} tokens, but the model has positions for {limit}; shorten it, or "
            "leave the row out"
        )
    if length + max_new_tokens > limit:
        raise ValueError(
            f"the prompt of row {row} has {length} tokens, which with max_new_tokens={max_new_tokens} are more than "
            f"the {limit} that the model has positions for; shorten it, or lower max_new_tokens to "
            f"{limit - length} or less"
        )


def _by_length(
    rows: dict[int, Sequence[int]], prompt_lengths: Sequence[int], limit: int
) -> list[tuple[int, list[int]]]:
    """Returns (length to pad to, numbers of the rows) for each group that has rows, the longest first."""
    longest = max((len(ids) for ids in rows.values()), default=0)
    bounds = sorted({min(length, limit) for length in prompt_lengths} | {longest})
    groups: dict[int, list[int]] = {}
    for row, ids in rows.items():
        groups.setdefault(next(bound for bound in bounds if bound >= len(ids)), []).append(row)
    return sorted(groups.items(), reverse=True)


def _batch(
    rows: dict[int, Sequence[int]], chosen: Sequence[int], batch_size: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Makes ids and mask, padded on the left and filled up with rows of padding, and the rows' numbers."""
    ids_BxL, mask_BxL = np.zeros((2, batch_size, length), np.int32)
    rows_B = np.zeros(batch_size, np.int32)
    for place, row in enumerate(chosen):
        ids_BxL[place, length - len(rows[row]) :] = rows[row]
        mask_BxL[place, length - len(rows[row]) :] = 1
        rows_B[place] = row
    return ids_BxL, mask_BxL, rows_B


def _text(tokenizer: Any, tokens: np.ndarray) -> str:
    # The text is as the model wrote it: no spaces are removed before punctuation.
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
