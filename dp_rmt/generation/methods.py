"""Methods to choose the next token, as values that can be compared, hashed and written into a config."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax


class Generated(NamedTuple):
    """What was generated for each prompt.

    Attributes:
        tokens_BxT: (B, max_new_tokens) token ids, the end token included; then padding.
        lengths_B: the number of tokens of each row, the end token included.
        scores_B: the sum of their log-probabilities under the model.
        normalised_scores_B: the score divided by length^length_penalty, by which beams compete; the same as `scores_B`
            where there are no beams.
    """

    tokens_BxT: jax.Array
    lengths_B: jax.Array
    scores_B: jax.Array
    normalised_scores_B: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """The options that all methods share.

    Attributes:
        max_new_tokens: the number of tokens after which a row ends in any case.
        eos_token_id: the token, or each of the tokens, that ends a row; None for rows of full length.
        pad_token_id: what stands after the end of a row; None for the (first) end token, or 0 if there is none.
        no_repeat_ngram_size: no n consecutive tokens come twice in prompt and continuation; 0 for no such rule.

    Raises:
        ValueError: a size is out of range.
    """

    max_new_tokens: int
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    no_repeat_ngram_size: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.eos_token_id, list):  # configs have lists, but a method must be hashable
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        self._check(self.max_new_tokens >= 1, "max_new_tokens", "1 or more")
        self._check(self.no_repeat_ngram_size >= 0, "no_repeat_ngram_size", "0 (off) or more")
        self._check(all(token >= 0 for token in self.end_tokens), "eos_token_id", "ids of 0 or more, or None")

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The tokens that end a row.

        >>> Greedy(max_new_tokens=3, eos_token_id=2).end_tokens
        (2,)
        """
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    @property
    def fill_token(self) -> int:
        """The token that stands after the end of a row.

        >>> Greedy(max_new_tokens=3, eos_token_id=(2, 7)).fill_token
        2
        """
        return self.pad_token_id if self.pad_token_id is not None else (*self.end_tokens, 0)[0]

    def _check(self, is_right: bool, name: str, advice: str) -> None:
        if not is_right:
            raise ValueError(f"{type(self).__name__}: {name} is {getattr(self, name)!r}; give {advice}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Greedy(Method):
    """Takes the most probable token every time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(Method):
    """Draws a token by its probability, softmax(logits / temperature), among the most probable ones.

    The draw is a function of the seed, the number of the row and the step, so that no row depends on its batch.

    Attributes:
        seed: the seed of the draws, in [0, 2^32), which is what `jax.random.key` keeps of a seed.
        temperature: divides the logits; towards 0 the method becomes greedy.
        top_k: how many of the most probable tokens are allowed; 0 for all.
        top_p: of those, the smallest set of total probability `top_p` or more (Holtzman et al. 2020); 1 for all.
    """

    seed: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(0 <= self.seed < 2**32, "seed", "in [0, 2^32)")
        self._check(self.temperature > 0, "temperature", "a number above 0, or use Greedy")
        self._check(self.top_k >= 0, "top_k", "0 (all tokens) or more")
        self._check(0 < self.top_p <= 1, "top_p", "a probability above 0, up to 1 (all tokens)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beam(Method):
    """Takes the best of `num_beams` continuations by sum of log-probabilities / length^length_penalty (transformers).

    Attributes:
        num_beams: continuations that are kept at each step.
        length_penalty: exponent of the length, the end token included; above 0 it favours long rows.
        early_stopping: says when a row with `num_beams` ended continuations ends. With True it ends at once. With False
            it ends when the best open one, taken at its present length, does not beat the worst of them. With "never"
            it ends when the best open one could not do so at any length; if length_penalty is above 0, its length is
            taken as `max_new_tokens`.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(self.num_beams >= 1, "num_beams", "1 or more")
        self._check(self.early_stopping in (True, False, "never"), "early_stopping", "True, False or 'never'")
