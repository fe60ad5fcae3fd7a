"""The rule of a convolution's kernel: a convolution is a product of patches with a matrix (docs/math.md).

This module knows arrays only, as `dp_rmt.clipping.leaf_rules` does.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from dp_rmt.clipping.contraction import Contraction


class Window(NamedTuple):
    """What a convolution does along one axis, in the words of `jax.lax.conv_general_dilated`."""

    size: int
    stride: int = 1
    dilation: int = 1
    input_dilation: int = 1
    padding: tuple[int, int] = (0, 0)
    border: tuple[int, int] = (0, 0)  # what the input is continued by before that, see `Convolution.border`

    @property
    def extent(self) -> int:
        """How many entries a patch spans."""
        return (self.size - 1) * self.dilation + 1


@dataclasses.dataclass(frozen=True)
class Convolution:
    """The rule of the kernel of ``y = conv(x, W)``, features last: ``sum_t patch_t(x_i) g_it``.

    With the patches ``P`` of x this is the rule of ``y = einsum("P,w->y", P, W)``, a `Contraction`, in norm, sum and
    rounding. Entries of x are copied into patches, so that P is exact. P is as large as x times the entries of a
    window, and lives in the backward pass alone.

    Attributes:
      windows: one for each axis along which the window slides.
      groups: how many groups of features there are; one sees nothing of the others.
      more_axes: how many axes stand between the batch and the windows' axes.
      border: how the input is continued, "wrap" or "reflect"; the windows say how far.
    """

    windows: tuple[Window, ...]
    groups: int = 1
    more_axes: int = 0
    border: Literal["wrap", "reflect"] = "wrap"

    def squared_norm(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """See `dp_rmt.clipping.leaf_rules.LeafRule`."""
        return self.contraction.squared_norm(self.patches(x), self._grouped(g))

    def weighted_sum(self, x: jax.Array, g: jax.Array, weights_B: jax.Array) -> jax.Array:
        """See `dp_rmt.clipping.leaf_rules.LeafRule`."""
        total = self.contraction.weighted_sum(self.patches(x), self._grouped(g), weights_B)
        return total.reshape(*(window.size for window in self.windows), -1, g.shape[-1])

    def of_users(self) -> Convolution:
        """See `dp_rmt.clipping.leaf_rules.LeafRule`."""
        return dataclasses.replace(self, more_axes=self.more_axes + 1)

    @property
    def contraction(self) -> Contraction:
        """The rule of the same kernel, with axes (windows..., inputs, groups, outputs), on patches."""
        letters = iter(string.ascii_lowercase)  # capitals name a second copy of an axis in `Contraction`
        tokens = "".join(next(letters) for _ in range(1 + self.more_axes))
        places, entries = ([next(letters) for _ in self.windows] for _ in range(2))
        group, features, outputs = next(letters), next(letters), next(letters)
        x_axes = tokens + "".join(place + entry for place, entry in zip(places, entries, strict=True))
        return Contraction(
            f"{x_axes}{group}{features}",
            f"{''.join(entries)}{features}{group}{outputs}",
            f"{tokens}{''.join(places)}{group}{outputs}",
        )

    def patches(self, x: jax.Array) -> jax.Array:
        """The patches of an input, (batch, ..., place, entry, ..., groups, features): each axis becomes two."""
        first = 1 + self.more_axes
        around = [(0, 0)] * first + [window.border for window in self.windows] + [(0, 0)]
        if any(map(any, around)):
            x = jnp.pad(x, around, mode=self.border)
        zeros = [(*window.padding, window.input_dilation - 1) for window in self.windows]
        x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0)] * first + zeros + [(0, 0, 0)])
        for number, window in enumerate(self.windows):
            axis = first + 2 * number
            places = (x.shape[axis] - window.extent) // window.stride + 1
            starts, entries = jnp.arange(places) * window.stride, jnp.arange(window.size) * window.dilation
            x = jnp.take(x, starts[:, None] + entries, axis=axis, mode="clip")  # a copy, which multiplies nothing
        return x.reshape(*x.shape[:-1], self.groups, -1)

    def _grouped(self, g: jax.Array) -> jax.Array:
        return g.reshape(*g.shape[:-1], self.groups, -1)


def windows_of(
    shape: Sequence[int],
    sizes: Sequence[int],
    *,
    strides: Sequence[int],
    dilations: Sequence[int],
    input_dilations: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
) -> tuple[Window, ...]:
    """The windows of a convolution over axes of these lengths.

    Args:
      shape: lengths of the axes along which the window slides.
      sizes: lengths of the window.
      strides: steps of the window.
      dilations: distances between entries of a window.
      input_dilations: distances between entries of the input.
      padding: zeros before and after each axis, "SAME", "SAME_LOWER" or "VALID"; "CAUSAL" (zeros before); "CIRCULAR" or
        "REFLECT", which continue the input.
    """
    plain = [Window(*each) for each in zip(sizes, strides, dilations, input_dilations, strict=True)]
    if padding in ("CIRCULAR", "REFLECT"):
        return tuple(w._replace(border=((w.extent - 1) // 2, w.extent // 2)) for w in plain)
    if padding == "CAUSAL":
        return tuple(w._replace(padding=(w.extent - 1, 0)) for w in plain)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(shape, [w.extent for w in plain], strides, padding)
    return tuple(w._replace(padding=(low, high)) for w, (low, high) in zip(plain, padding, strict=True))
