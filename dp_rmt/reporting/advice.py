"""What limits a private run, in one sentence with the numbers that it rests on; from noisy values alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import bdtrc, ndtr

from dp_rmt.reporting.series import Run, labels

OVERSHOT = -2.0
"""A step whose slope z is below this went too far, or met noise that one step in 44 meets."""

FALSE_ALARMS = 0.01
"""Of so many runs whose loss rises behind no step, at most this share is said to overshoot."""

TOO_FAST = 0.4
"""Where this share of the steps overshot, half the learning rate was better in five of five pairs of runs, and in four
of fifteen where fewer did. The number was chosen on these pairs (experiments/studies/whitening)."""

_BY_CHANCE = float(ndtr(OVERSHOT))
_ONE_DIRECTION = 0.5


@dataclasses.dataclass(frozen=True)
class Advice:
    """What was seen in a run, and what follows.

    Attributes:
      num_steps: steps whose slope was measured: all but the last, unless the update was 0.
      num_overshot: those with z below -2.
      alarm_from: so many of them are beyond chance; see `alarm_from`.
      top_over_edge: y_1 / e of the largest matrix in the median step, or rather a lower bound; None without matrices.
      top_share: the largest share that one direction has of the inputs of a layer; None where it is not known.
      sentence: what limits the run and which setting to change, with `code` for names.
    """

    num_steps: int
    num_overshot: int
    alarm_from: int
    top_over_edge: float | None
    top_share: float | None
    sentence: str

    @property
    def overshoots(self) -> bool:
        """Whether more steps overshot than chance explains."""
        return self.num_overshot >= self.alarm_from

    @property
    def is_too_fast(self) -> bool:
        """Whether so many steps overshot that half the learning rate should end better."""
        return self.overshoots and self.num_overshot >= TOO_FAST * self.num_steps


def alarm_from(num_steps: int) -> int:
    """The least number of slopes below -2 that is said to be overshooting.

    Where the loss rises behind no step, each slope is below -2 with a probability of at most Phi(-2) = 2.3%, whatever
    happened before. Their number is therefore at most binomial, and the result is the least k with
    ``P(Binomial(num_steps, 2.3%) >= k) <= 1%`` (docs/math.md, "The slope along the last step").

    Args:
      num_steps: slopes that were measured, at least 0.

    Returns:
      k, at least 1; more than num_steps where no number of them would be enough.

    >>> [alarm_from(steps) for steps in (1, 2, 15, 30, 100)]
    [2, 2, 3, 4, 7]
    """
    return next(
        k for k in range(1, num_steps + 2) if k > num_steps or bdtrc(k - 1, num_steps, _BY_CHANCE) <= FALSE_ALARMS
    )


def advice(
    metrics: Sequence[Mapping[str, Any]],
    top_shares: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Advice | None:
    """Says what limits a run.

    Args:
      metrics: lines of `metrics.jsonl`, of which ``advice/slope``, ``advice/top_over_edge``, ``denoise/...`` and
        ``geometry/top_share`` are read.
      top_shares: path -> the share of the top eigenvalue of the layer's input covariance, a number or one for each
        stacked layer; None for those in the metrics.
      config: content of `config.json`. What it has switched on already is not advised again; None if it is not known.

    Returns:
      `Advice`; None where nothing was measured that a sentence could rest on.

    >>> lines = [{"step": t, "advice/slope": -3.0 if t % 3 == 0 else 0.5} for t in range(2, 17)]
    >>> print(advice(lines).sentence[:50])
    5 of 15 steps overshot (0.3 would by chance): whit
    """
    run = Run(metrics=metrics, config={}, privacy={})
    slopes, ratios = (run.series(f"advice/{name}").values for name in ("slope", "top_over_edge"))
    if top_shares is None:
        top_shares = next((line["geometry/top_share"] for line in metrics if line.get("geometry/top_share")), {})
    shares = {path: float(np.max(values)) for path, values in top_shares.items()}
    layer = max(shares, key=lambda path: shares[path], default=None)
    found = Advice(
        num_steps=len(slopes),
        num_overshot=int(np.sum(slopes < OVERSHOT)),
        alarm_from=alarm_from(len(slopes)),
        top_over_edge=float(np.median(ratios)) if len(ratios) else None,
        top_share=None if layer is None else shares[layer],
        sentence="",
    )
    is_whitened = ((config or {}).get("whitening") or {}).get("where", "nowhere") != "nowhere"
    inputs = ""
    if layer is not None and shares[layer] > _ONE_DIRECTION and not is_whitened:
        inputs = f"{shares[layer]:.0%} of the inputs of `{layer}`"
    denoises = any(name.startswith("denoise/") for line in metrics for name in line)
    # Whitening helped in every pair of runs of its study, whether the run without it overshot or not.
    whitening = "whiten the inputs (`config.whitening.where`); " if config and not is_whitened else ""
    sentence = _sentence(found, inputs, denoises, _remedies(config or {}, is_whitened, found.is_too_fast), whitening)
    return dataclasses.replace(found, sentence=sentence) if sentence else None


def advice_by_run(runs: Mapping[str, Run]) -> dict[str, str]:
    """The sentence of every run that has one, by its label."""
    found = {label: advice(run.metrics, config=run.config) for label, run in zip(labels(runs), runs.values())}
    return {label: of_run.sentence for label, of_run in found.items() if of_run is not None}


def advice_lines(runs: Mapping[str, Run]) -> str:
    """The sentences for the terminal, a line for each run that has one; empty without any."""
    found = advice_by_run(runs)
    return "".join(
        f"Advice{f' for {label}' if len(runs) > 1 else ''}: {sentence}\n" for label, sentence in found.items()
    )


def _remedies(config: Mapping[str, Any], is_whitened: bool, is_too_fast: bool) -> str:
    """What helps against steps that are too long, without what the config has already."""
    named = config.get("optimizer") or ""
    name, options = (named, {}) if isinstance(named, str) else named
    has_b1 = not name or name in ("adamw", "denoised_adam", "adam_bc")
    train = config.get("train") or {}
    # Where the rate falls to 0 the last iterate is as good as an average, by the study of whitening.
    needs_no_average = train.get("average_iterates") is not None or train.get("schedule", "constant") != "constant"
    ways = [
        *([] if is_whitened else ["whiten the inputs (`config.whitening.where`)"]),
        *(["lower b1 (`config.optimizer`)"] if has_b1 and options.get("b1", 0.9) > 0.5 else []),
        *([] if needs_no_average else ["average the iterates (`config.train.average_iterates`)"]),
        *(["try half the learning rate (`config.train.learning_rate`)"] if is_too_fast else []),
    ]
    if not ways:
        return "at its best learning rate a run does so, too"
    return ", ".join(ways[:-1]) + (" or " if ways[:-1] else "") + ways[-1]


def _sentence(found: Advice, inputs: str, denoises: bool, remedies: str, whitening: str) -> str:
    """The sentence on what was found; empty where there is nothing to say."""
    if found.alarm_from > found.num_steps:
        return (
            f"Before training: one direction has {inputs}, and curvature along it limits the learning rate: whiten the "
            "inputs (`config.whitening.where`)."
            if inputs
            else ""
        )
    if found.overshoots:
        because = f"; one direction has {inputs}, so begin with whitening" if inputs else ""
        return f"{_overshot(found)}: {remedies}{because}."
    start = _overshot(found) if found.num_overshot else f"None of {found.num_steps} steps overshot"
    if found.top_over_edge is None:
        return f"{start}; there is no matrix whose spectrum would say more."
    seen = f"y₁/e is {found.top_over_edge:.2g} or more in half of the steps"
    if found.top_over_edge > 1:
        advised = "denoising, which is on, can save steps" if denoises else "denoising can save steps"
        return f"{start} and the gradients stand above the noise ({seen}): {advised} (`config.denoise`)."
    return (
        f"{start} and no gradient was seen to stand above the noise ({seen}): {whitening}more data or a larger batch "
        "(`config.privacy.expected_batch_size`) is what makes the noise smaller."
    )


def _overshot(found: Advice) -> str:
    chance = found.num_steps * _BY_CHANCE
    return f"{found.num_overshot} of {found.num_steps} steps overshot ({chance:.1f} would by chance)"
