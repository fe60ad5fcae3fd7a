"""Joins: leaves that are denoised side by side, such as everything that reads a transformer's residual stream.

The gradient of a kernel that reads the stream is ``X^T D``: X holds the stream's states, and the rows of X^T are its
channels. Residual connections carry much the same states through all layers. These gradients therefore have column
spaces in common, and need fewer components side by side than alone (docs/design/0004).

    dp_rmt.denoise_matrices(noise_std, matrix_rule=layers_side_by_side, join=reads_the_stream)
"""

from __future__ import annotations

import re
from collections.abc import Callable

import jax

from dp_rmt.denoising.matrix_view import MatrixAxes, kernels_are_matrices

WEIGHT = r"(_lora/lora_a/kernel|[/.](kernel|weight|w)|[/.]lora_[aA]([/.]default)?([/.]weight)?)"
"""The pattern of what follows the name of a layer in the path of its weight, or of the A factor of its LoRA."""

_READS = re.compile(
    r"(?P<before>(.*[/.])?)(layers?|h|blocks?)([_/.]\d+)?[/.](.*[/.])?"
    rf"(query|key|value|[qkv](?=_proj)|gate|up|intermediate)(_proj)?(?P<after>{WEIGHT})"
)


def reads_the_stream(path: str) -> str | None:
    """Join rule for kernels, or A factors of LoRA, whose input is the residual stream, in any layer.

    >>> reads_the_stream("encoder/layers/attention/query/kernel")
    'encoder/residual_stream/kernel'
    >>> reads_the_stream("decoder/layers_3/up_lora/lora_a/kernel")
    'decoder/residual_stream_lora/lora_a/kernel'
    >>> reads_the_stream("model.layers.3.mlp.up_proj.weight")
    'model.residual_stream.weight'
    >>> reads_the_stream("decoder/layers/down/kernel") is None  # it writes to the stream
    True
    """
    found = _READS.fullmatch(path)
    return f"{found['before']}residual_stream{found['after']}" if found else None


def layers_side_by_side(path: str, leaf: jax.ShapeDtypeStruct) -> MatrixAxes | None:
    """Matrix rule like `kernels_are_matrices`, but what reads the stream in all layers is columns of one matrix.

    >>> import jax.numpy as jnp
    >>> layers_side_by_side("encoder/layers/attention/query/kernel", jnp.zeros((6, 64, 32)))
    MatrixAxes(rows=(-2,), cols=(-3, -1))
    """
    axes = kernels_are_matrices(path, leaf)
    if axes is None or reads_the_stream(path) is None:
        return axes
    layers = tuple(axis for axis in range(-leaf.ndim, 0) if axis not in axes.rows + axes.cols)
    return MatrixAxes(axes.rows, layers + axes.cols)


JoinRule = Callable[[str], str | None]
"""A function ``path -> name`` of the block matrix that a leaf is a column block of, None for a matrix of its own."""


_SHARED_INPUT = (("qkv", "query|key|value|[qkv](?=_proj)"), ("gate_up", "gate|up"))


def shared_inputs(path: str) -> str | None:
    """Join rule for projections of the same input, (query, key, value) and (gate, up), and the A factors of their LoRA.

    Their gradients ``X^T D_q, X^T D_k, X^T D_v`` (X the inputs of the layer, D the gradients of its outputs) have the
    column space of ``X^T`` in common, so one block matrix needs fewer components than three matrices.

    >>> shared_inputs("encoder/layers/attention/key/kernel")
    'encoder/layers/attention/qkv/kernel'
    >>> shared_inputs("layers/attention/value_lora/lora_a/kernel")
    'layers/attention/qkv_lora/lora_a/kernel'
    >>> shared_inputs("model.layers.0.self_attn.q_proj.weight")
    'model.layers.0.self_attn.qkv_proj.weight'
    >>> shared_inputs("layers/attention/value_lora/lora_b/kernel") is None  # its input is x A, another for each
    True
    """
    for joined, names in _SHARED_INPUT:
        found = re.fullmatch(rf"(?P<before>(.*[/.])?)({names})(?P<after>(_proj)?{WEIGHT})", path)
        if found:
            return f"{found['before']}{joined}{found['after']}"
    return None
