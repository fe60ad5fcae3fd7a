"""A small recurrent network as the model of the decoding algorithms: what it says depends on all that it has read.

    h <- tanh(h W + E[token]),  logits = h U

Its cache is h, so that a beam with another's cache says something else.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

WIDTH = 5
END = 0


def random_params(seed: int, vocab_size: int, *, scale: float = 2.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"embedding": (vocab_size, WIDTH), "recurrent": (WIDTH, WIDTH), "output": (WIDTH, vocab_size)}
    return {name: scale * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def step(params: Any, tokens_R: Any, hidden_RxH: Any, np: Any = jnp) -> tuple[Any, Any]:
    """With np=numpy the same outside of JAX."""
    hidden_RxH = np.tanh(hidden_RxH @ params["recurrent"] + params["embedding"][tokens_R])
    return hidden_RxH @ params["output"], hidden_RxH


def reorder(hidden_RxH: jax.Array, parents_BxK: jax.Array) -> jax.Array:
    hidden_BxKxH = hidden_RxH.reshape(*parents_BxK.shape, -1)
    return jnp.take_along_axis(hidden_BxKxH, parents_BxK[:, :, None], axis=1).reshape(hidden_RxH.shape)


def score(params: dict[str, np.ndarray], first: int, continuation: tuple[int, ...]) -> float:
    """Sum of the log-probabilities of a continuation, in float64."""
    params = {name: array.astype(np.float64) for name, array in params.items()}
    hidden, total, last = np.zeros((1, WIDTH)), 0.0, first
    for token in continuation:
        logits, hidden = step(params, np.array([last]), hidden, np)
        total += logits[0, token] - np.logaddexp.reduce(logits[0])
        last = token
    return float(total)


def all_continuations(vocab_size: int, length: int) -> list[tuple[int, ...]]:
    """Those that end with END, and those of full length."""
    found = []
    for count in range(1, length + 1):
        for tokens in itertools.product(range(vocab_size), repeat=count):
            if END not in tokens[:-1] and (tokens[-1] == END or count == length):
                found.append(tokens)
    return found
