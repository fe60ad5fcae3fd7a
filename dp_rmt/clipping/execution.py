"""How a clipped gradient is computed, beside the mechanism that says what is computed."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from dp_rmt.arguments import integer, one_of

ClippingMethod = Literal["auto", "vmap", "bookkeeping", "ghost"]


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a clipped gradient is computed, which changes its speed and memory, and its numbers by rounding only.

    Privacy depends on nothing here, so it stands beside `DPSGD`, whose numbers are the guarantee's.

    Attributes:
      clipping_method: "vmap" computes each example's gradient, of any model. "bookkeeping" and "ghost" compute none, at
        little more than the cost of a plain gradient, for Flax models of stock layers (`ghost_clipped_grad`, which
        refuses others). "auto" takes the better of the last two where they fit the model, and "vmap" where they do not.
      microbatch_size: examples (or users) differentiated at once: a number, which must divide the batch (give it to
        `DPSGD.batch_multiple_of`); None for the whole batch; or "auto". A run that knows its data
        (`dp_rmt.training.prepare.prepare_run`) finds by compiling how many fit into the memory. `DPSGD.clipped_grad` by
        itself has nothing to compile: there "auto" is the whole batch.

    Raises:
      ValueError: a value is out of range.
    """

    clipping_method: ClippingMethod = "auto"
    microbatch_size: int | Literal["auto"] | None = "auto"

    def __post_init__(self) -> None:
        one_of("clipping_method", self.clipping_method, get_args(ClippingMethod))
        given = self.microbatch_size
        if given is not None and not (isinstance(given, str) and given == "auto"):
            wanted = "be at least 1 and an integer, 'auto', or None for the whole batch"
            object.__setattr__(self, "microbatch_size", integer("microbatch_size", given, wanted, lambda n: n >= 1))


AUTO = Execution()
"""Found by looking at the model and the memory."""
