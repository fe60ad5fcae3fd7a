"""The coordinates of a run: second moments of what its layers see on public rows, whitened as the settings say."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from dp_rmt.clipping.coordinates import Coordinates
from dp_rmt.data import fingerprint
from dp_rmt.data.tokens.public_rows import public_text_rows, random_token_rows
from dp_rmt.finetuning.settings import Settings, Whitening
from dp_rmt.finetuning.tasks.task import Task
from dp_rmt.geometry.layer_moments import LayerMoments, layer_moments
from dp_rmt.geometry.whitening import top_shares, whitened_coordinates
from dp_rmt.trees import split_params


class Geometry(NamedTuple):
    """What is known of a model's layers before training.

    Attributes:
      coordinates: in which updates are evened out.
      top_shares: share of the largest eigenvalue of the inputs of each matrix, by path.
      fingerprint: of the maps, by which two runs can be seen to have had the same.
      rows: what the moments were taken from, in words.
      text_digest: of the file of public text; None for random tokens.
    """

    coordinates: Coordinates
    top_shares: dict[str, float]
    fingerprint: str
    rows: str
    text_digest: str | None = None

    def facts(self) -> dict[str, Any]:
        """What the metrics say before the first step."""
        return {"geometry/top_share": self.top_shares, "geometry/fingerprint": self.fingerprint}


def geometry_of(settings: Settings, task: Task) -> Geometry | None:
    """Whitens the trained matrices of a task's model; None where `config.whitening.where` is "nowhere".

    The rows are random tokens, or the public text of `config.whitening.text`; no row of the task's data is looked at.

    Args:
      settings: their whitening and seed.
      task: model and parameters.

    Returns:
      The geometry.

    Raises:
      ValueError: no trained matrix has a layer with a rule, or the public text does not fit.
      FileNotFoundError: there is no file of public text.
    """
    if settings.whitening.where == "nowhere":
        return None
    moments = moments_of(settings.whitening, task, settings.seed)
    whitening = settings.whitening
    coordinates = whitened_coordinates(moments, ridge=whitening.ridge, power=whitening.power, rank=whitening.rank)
    shares = top_shares(moments)
    widest = max(shares, key=shares.__getitem__)
    logging.info(
        "%d matrices in whitened coordinates; the largest share of one direction in a layer's inputs is %.2f (%s)",
        len(coordinates.leaves),
        shares[widest],
        widest,
    )
    maps = {
        f"{name}/{part}": np.asarray(getattr(axis_map, part))
        for name, axis_map in coordinates.maps.items()
        for part in ("scale", "basis")
    }
    if whitening.text is None:
        return Geometry(coordinates, shares, fingerprint(maps), "random tokens")
    digest = hashlib.sha256(Path(whitening.text).expanduser().read_bytes()).hexdigest()
    return Geometry(coordinates, shares, fingerprint(maps), f"the text of `{Path(whitening.text).name}`", digest)


def _few(lengths: Sequence[int]) -> list[int]:
    """The shortest, a middle one and the longest: each length is compiled, which takes most of the time."""
    ordered = sorted(set(lengths))
    return sorted({ordered[0], ordered[len(ordered) // 2], ordered[-1]})


def moments_of(whitening: Whitening, task: Task, seed: int) -> dict[str, LayerMoments]:
    """The second moments of the trained matrices' layers, on public rows; errors as of `geometry_of`."""
    options: dict[str, Any] = {
        "lengths": _few(task.lengths),
        "num_rows": whitening.rows,
        "num_labels": task.num_labels,
        "seed": seed,
    }
    if whitening.text is None:
        rows = random_token_rows(task.tokenizer, **options)
    else:
        path = Path(whitening.text).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"config.whitening.text={whitening.text}: there is no such file; give public text with one text a "
                "line, or None for random tokens"
            )
        texts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        rows = public_text_rows(texts, task.tokenizer, **options)
    trained, frozen = split_params(task.params, task.trainable)
    return layer_moments(task.losses, trained, rows, frozen=frozen, outputs=whitening.sides == "both")
