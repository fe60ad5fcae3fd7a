"""What a run trains: data, a loss, parameters, and how to see whether they are any good."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dp_rmt.batch_selection import number_users
from dp_rmt.data import fingerprint
from dp_rmt.data.length_groups import check_lengths
from dp_rmt.trees import merge_params, split_params
from dp_rmt.types import Params, PerExampleLosses

Evaluator = Callable[[Params], dict[str, float]]
"""``all parameters -> scores by name``"""


@dataclasses.dataclass(frozen=True)
class Task:
    """Data and a model of one's own, as `dp_rmt.training.prepare.prepare_run` takes them.

    Attributes:
      train: training data, name -> array whose first axis is the examples. Without `users` a row is the unit of
        privacy: all that one person gave should then be in one row.
      losses: ``(params, batch) -> (B,)``, a function of ALL parameters that gives one loss for each example; no example
        may influence the loss of another.
      params: nested dicts of arrays, with names for keys.
      trainable: regular expression over the paths of parameters, such as ``"params/Dense_0/kernel"``; what it matches
        somewhere is trained, the rest is frozen.
      lengths: for texts, ascending lengths in tokens; each row of a batch is cut to the shortest that holds it. The
        last is the length of the data, which then needs an ``attention_mask`` (N, L). Empty for other data.
      evaluators: name of the evaluation data -> function of all parameters that gives its scores.
      users: an id for each row of `train`, integers or strings: the unit of privacy is then a user with all of its
        rows, for a `DPSGD` with `rows_per_user`. They are kept as numbers, in the order of the users' first rows.

    Raises:
      ValueError: the arrays have different numbers of examples, the parameters are no nested dicts, the lengths do
        not fit, or the users are not one id for each row.
    """

    train: Mapping[str, np.ndarray]
    losses: PerExampleLosses
    params: Mapping[str, Any]
    trainable: str = ".*"
    lengths: tuple[int, ...] = ()
    evaluators: Mapping[str, Evaluator] = dataclasses.field(default_factory=dict)
    users: Sequence[Any] | np.ndarray | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", {name: np.asarray(array) for name, array in self.train.items()})
        shapes = {name: array.shape for name, array in self.train.items()}
        rows = {shape[0] if shape else 0 for shape in shapes.values()}
        if len(rows) != 1 or 0 in rows:
            raise ValueError(
                f"train has arrays of the shapes {shapes}: the first axis of each must be the examples, one or more"
            )
        if self.lengths:
            if "attention_mask" not in self.train:
                raise ValueError(
                    f"lengths={self.lengths} are for texts, whose train data has an 'attention_mask' (N, L)"
                )
            check_lengths(self.lengths, self.train["attention_mask"].shape[1])
        if self.users is not None:
            object.__setattr__(self, "users", number_users(self.users))
            if len(self.users) != self.num_examples:
                raise ValueError(
                    f"users has {len(self.users)} ids for {self.num_examples} rows of train: give one id for each row"
                )
        again: Any = jax.tree.structure(merge_params(*split_params(self.params, "")))
        if again != jax.tree.structure(self.params):
            raise ValueError(
                "params must be nested dicts of arrays with names for keys, as Flax gives them. For a model of another "
                "library, pass dicts and put the model together inside the losses"
            )

    @property
    def num_examples(self) -> int:
        """Rows of the training data."""
        return len(next(iter(self.train.values())))

    @property
    def num_units(self) -> int:
        """What a `DPSGD` of this task counts, N: users where they are given, else rows."""
        return self.num_examples if self.users is None else int(np.max(self.users)) + 1

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the training data, and of whose rows they are."""
        return fingerprint(self.train if self.users is None else {**self.train, "users": np.asarray(self.users)})
