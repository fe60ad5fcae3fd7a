"""From a prompt to its continuation, with one compiled program for each shape and method."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from dp_rmt.generation.beam_search import beam_search
from dp_rmt.generation.methods import Beam, Generated, Method, Sampling
from dp_rmt.generation.token_by_token import Choose, draw, most_probable, token_by_token
from dp_rmt.models import DecoderCache, init_cache
from dp_rmt.types import Params


def generate(
    module: Any,
    params: Params,
    ids_BxL: np.ndarray | jax.Array,
    mask_BxL: np.ndarray | jax.Array,
    method: Method,
    *,
    rows_B: np.ndarray | jax.Array | None = None,
    mesh: Mesh | None = None,
) -> Generated:
    """Continues prompts until all have ended. No row depends on the others, nor on the padding before it.

    Args:
        module: a `CausalLanguageModel`.
        params: its parameters.
        ids_BxL: token ids of the prompts, padded on the left.
        mask_BxL: 1 for a token, 0 for padding. A row of padding alone fills up a batch and gets no token.
        method: `Greedy`, `Beam` or `Sampling`.
        rows_B: the number of each row, which together with the seed decides what is sampled; by default 0, 1, ...
        mesh: the rows are divided over its devices, and each device goes on until its own rows have ended. B must be a
            multiple of the number of devices.

    Returns:
        What was generated. It is divided over the mesh as the rows are.

    Raises:
        ValueError: a prompt is padded on the right, prompt and new tokens do not fit the model's positions, an end
            token is not in its vocabulary, or the devices do not divide the rows.
    """
    ids, mask = np.asarray(ids_BxL, np.int32), np.asarray(mask_BxL) != 0
    _check(module, mask, method, mesh)
    rows_B = np.arange(len(ids), dtype=np.int32) if rows_B is None else np.asarray(rows_B, np.int32)
    key = jax.random.key(0)
    if isinstance(method, Sampling):
        # The seed is data, not part of the program.
        key, method = jax.random.key(method.seed), dataclasses.replace(method, seed=0)
    return _compiled(module, method, mesh)(params, key, ids, mask, rows_B)


@functools.lru_cache(maxsize=64)
def _compiled(module: Any, method: Method, mesh: Mesh | None) -> Any:
    program = functools.partial(_generate, module, method)
    if mesh is None:
        return jax.jit(program)
    whole, by_row = PartitionSpec(), PartitionSpec(mesh.axis_names)
    # There is no communication, so that no device waits for another's rows. shard_map adds sums of its own when it is
    # differentiated (docs/sharp_edges.md), but nothing is differentiated here.
    return jax.jit(
        jax.shard_map(
            program, mesh=mesh, in_specs=(whole, whole, by_row, by_row, by_row), out_specs=by_row, check_vma=False
        )
    )


def _generate(
    module: Any,
    method: Method,
    params: Params,
    key: jax.Array,
    ids_BxL: jax.Array,
    mask_BxL: jax.Array,
    rows_B: jax.Array,
) -> Generated:
    """The program. It reads all of the prompt but its last token at once, then that token, and so on one at a time."""
    rows, length = ids_BxL.shape
    params = in_compute_dtype(params, module.config.dtype)
    # The last new token is never read.
    cache = init_cache(module.config, rows, length + method.max_new_tokens - 1)
    if length > 1:
        _, cache = module.apply({"params": params}, ids_BxL[:, :-1], mask_BxL[:, :-1], cache)

    def step(tokens_R: jax.Array, cache: DecoderCache) -> tuple[jax.Array, DecoderCache]:
        ones_Rx1 = jnp.ones((len(tokens_R), 1), jnp.int32)
        logits_Rx1xV, cache = module.apply({"params": params}, tokens_R[:, None], ones_Rx1, cache)
        return logits_Rx1xV[:, 0], cache

    if isinstance(method, Beam):
        cache = _repeat_rows(cache, method.num_beams)
        reorder = functools.partial(_reorder, first=length)
        return beam_search(step, cache, reorder, ids_BxL, mask_BxL, method)
    choose: Choose = most_probable
    if isinstance(method, Sampling):
        choose = functools.partial(draw, method=method, key=key, rows_B=rows_B)
    return token_by_token(step, cache, ids_BxL, mask_BxL, choose, method)


def in_compute_dtype(params: Params, dtype: Any) -> Params:
    """Rounds the matrices once, as the layers would do at each token. Norms and biases stay float32."""

    def rounded(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if path[-1].key in ("kernel", "embedding") else leaf

    return jax.tree_util.tree_map_with_path(rounded, params)


def _repeat_rows(cache: DecoderCache, beams: int) -> DecoderCache:
    """Repeats each row for its beams, side by side."""
    return cache._replace(
        keys=jnp.repeat(cache.keys, beams, axis=1),
        values=jnp.repeat(cache.values, beams, axis=1),
        mask_BxS=jnp.repeat(cache.mask_BxS, beams, axis=0),
    )


def _reorder(cache: DecoderCache, parents_BxK: jax.Array, *, first: int) -> DecoderCache:
    """Gives beams the slots of their parents from the first new token on, as all beams of a row share the prompt."""
    rows, beams = parents_BxK.shape

    def move(slots: jax.Array) -> jax.Array:
        new = slots[:, :, :, first:]
        of_beam = new.reshape(len(new), rows, beams, *new.shape[2:])
        moved = jax.vmap(lambda x, parents: x[:, parents], in_axes=(1, 0), out_axes=1)(of_beam, parents_BxK)
        return slots.at[:, :, :, first:].set(moved.reshape(new.shape))

    return cache._replace(keys=move(cache.keys), values=move(cache.values))


def _check(module: Any, mask_BxL: np.ndarray, method: Method, mesh: Mesh | None) -> None:
    rows, length = mask_BxL.shape
    wrong_rows = np.flatnonzero((mask_BxL[:, :-1] & ~mask_BxL[:, 1:]).any(axis=1))
    if len(wrong_rows):
        raise ValueError(
            f"row {wrong_rows[0]} has padding behind a token; pad prompts on the left, so that the next token stands "
            "at the same place in every row"
        )
    limit, vocab_size = module.config.max_position_embeddings, module.config.vocab_size
    if length + method.max_new_tokens > limit:
        raise ValueError(
            f"prompts of {length} tokens and {method.max_new_tokens} new ones are more than the {limit} that the "
            "model has positions for; shorten the prompts, or lower max_new_tokens"
        )
    unknown = [token for token in method.end_tokens if token >= vocab_size]
    if unknown:
        raise ValueError(f"eos_token_id {unknown[0]} is not among the model's {vocab_size} tokens")
    if mesh is not None and rows % mesh.size:
        raise ValueError(f"{rows} rows on {mesh.size} devices; give a multiple, filled up with rows of padding")
