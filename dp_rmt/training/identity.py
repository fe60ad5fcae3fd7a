"""The identity of an experiment: the facts that a checkpoint and the run that goes on from it must agree on.

A fact that says where something lies, ``X``, may have another that says what it is, ``X.content``. Where both sides
know the content, it alone must agree: a folder that was copied elsewhere goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from dp_rmt.clipping.execution import Execution
from dp_rmt.training.guarantee import Guarantee

LATER_OPTIONS = {
    "clip_quantile": None,
    "rows_per_user": None,
    "noise_strategy": None,
    "noise_generator": "threefry2x32",
}
"""Attributes of `dp_rmt.DPSGD` that came after the first runs, with what those had. A fact of that value is left out,
so that what was begun before there was the option can go on."""


def facts_of_run(guarantee: Guarantee, execution: Execution, mesh: Mesh, more: Mapping[str, Any]) -> dict[str, str]:
    """What a checkpoint and the run that goes on from it must agree on.

    Args:
      guarantee: has the mechanism, delta, the fingerprint of the data, and the private scores.
      execution: as it was given, because on other devices a resumed run rounds its microbatches up differently.
      mesh: a fact where scores are private: on another one a repeated score could differ, and its noise would cancel.
      more: what the functions of the run depend on.
    """
    facts = dataclasses.asdict(guarantee.mechanism) | dataclasses.asdict(execution)
    facts = {name: value for name, value in facts.items() if name not in LATER_OPTIONS or value != LATER_OPTIONS[name]}
    if guarantee.private_scores is not None:
        facts |= {"private_scores": dataclasses.astuple(guarantee.private_scores), "mesh": dict(mesh.shape)}
    facts |= {"delta": guarantee.delta, "train_data": guarantee.train_data, **more}
    return {name: str(value) for name, value in facts.items()}


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each fact on which two identities do not agree.

    Args:
      saved: of the checkpoint.
      now: of the run.

    >>> there = {"steps": 3, "model.path": "/a", "model.path.content": "1"}
    >>> differences(there, there | {"model.path": "/b"})
    []
    >>> differences(there, there | {"model.path.content": "2"})
    ["  model.path.content: checkpoint '1', now '2'"]
    >>> differences({"model.path": "/a"}, there | {"model.path": "/b"})  # as an earlier version saved it
    ["  model.path: checkpoint '/a', now '/b'", '  steps: checkpoint None, now 3']
    """
    return [
        f"  {name}: checkpoint {saved.get(name)!r}, now {now.get(name)!r}"
        for name in sorted({*saved, *now})
        if saved.get(name) != now.get(name) and not _is_known_otherwise(name, saved, now)
    ]


def _is_known_otherwise(name: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a fact need not agree: a place whose content both know, or a content that one of them does not know."""
    place = name.removesuffix(".content")
    both_know = f"{place}.content" in saved and f"{place}.content" in now
    return both_know if name == place else place in now and not both_know
