"""How rotary embeddings are stretched for longer texts than those of pre-training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

_KEYS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
}
"""For each kind the keys of `rope_parameters` that it has, which are fields of `RopeScaling`, too."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary embedding's wavelengths are stretched for longer texts than those of pre-training.

    Attributes:
        factor: by how much they are stretched.
        kind: "linear" stretches all of them (Chen et al. 2023). "llama3" stretches those longer than original /
            low_freq_factor positions, leaves those shorter than original / high_freq_factor, and blends in between.
            "yarn" stretches those that turn less than beta_slow times within the original positions, leaves those that
            turn more than beta_fast times, and blends in between (Peng et al. 2023). "longrope" divides each frequency
            by its own number, of `short_factor` or, in texts longer than original, of `long_factor` (Ding et al. 2024).
            "dynamic" stretches texts longer than max_position_embeddings alone, and there are none here.
        low_freq_factor: see kind.
        high_freq_factor: see kind.
        original_max_position_embeddings: see kind.
        attention_factor: cosine and sine are multiplied by it ("yarn" and "longrope").
        beta_fast: see kind.
        beta_slow: see kind.
        truncate: "yarn" blends between whole numbers of frequencies.
        short_factor: see kind.
        long_factor: see kind.

    Raises:
        ValueError: the kind is unknown.
    """

    factor: float
    kind: str = "linear"
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in _KEYS:
            raise ValueError(f"rope_type {self.kind!r} is not supported; supported: default, {', '.join(_KEYS)}")
        object.__setattr__(self, "short_factor", tuple(self.short_factor))
        object.__setattr__(self, "long_factor", tuple(self.long_factor))

    def frequencies(self, plain: np.ndarray, theta: float) -> tuple[np.ndarray, np.ndarray]:
        """Scales angular frequencies.

        Args:
            plain: the frequencies theta^(-2 k / R), for k < R / 2.
            theta: the base of the wavelengths.

        Returns:
            The scaled frequencies, in float32: those in texts of at most `original_max_position_embeddings` tokens, and
            those in longer texts. The two are one array, but for "longrope".

        Raises:
            ValueError: "longrope" has not one factor for each frequency.
        """
        if self.kind != "longrope":
            scaled = self._scaled(plain, theta).astype(np.float32)
            return scaled, scaled
        for name in ("short_factor", "long_factor"):
            if len(getattr(self, name)) != len(plain):
                raise ValueError(
                    f"longrope has {len(getattr(self, name))} numbers in {name}, but each head turns {len(plain)} "
                    "pairs; take config.json from the model's own folder"
                )
        short, long = (
            (plain / np.array(x, np.float32)).astype(np.float32) for x in (self.short_factor, self.long_factor)
        )
        return short, long

    def _scaled(self, plain: np.ndarray, theta: float) -> np.ndarray:
        if self.kind == "dynamic":
            return plain
        if self.kind == "linear":
            return plain / self.factor
        if self.kind == "llama3":
            turns = self.original_max_position_embeddings * plain / (2 * math.pi)
            kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        else:
            kept = 1 - self._yarn_ramp(2 * len(plain), theta)
        return (kept + (1 - kept) / self.factor) * plain

    def _yarn_ramp(self, width: int, theta: float) -> np.ndarray:
        """0 for frequencies that stay, 1 for those that are stretched whole."""

        def number_of(turns: float) -> float:
            """Which frequency, as a real number, turns so often within the original positions."""
            wavelength = self.original_max_position_embeddings / turns
            return width * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

        low, high = number_of(self.beta_fast), number_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high += 0.001 if low == high else 0  # as in transformers
        return np.clip((np.arange(width // 2) - low) / (high - low), 0, 1)

    @classmethod
    def from_hf(cls, given: Mapping[str, Any], *, kind: str, original: int | None, longest: int) -> RopeScaling:
        """Reads `rope_parameters`, or an older `rope_scaling`, as transformers does.

        Args:
            given: the JSON object, without nulls.
            kind: its rope_type.
            original: the model's original_max_position_embeddings where the config has it outside of `given`.
            longest: the model's max_position_embeddings.

        Returns:
            The scaling, with the defaults of transformers, and what follows from other keys, filled in.

        Raises:
            ValueError: the kind is unknown, or a key that it needs is absent.
        """
        values = {key: given[key] for key in _KEYS.get(kind, ()) if key in given}
        if kind in ("llama3", "yarn", "longrope"):
            inside = given.get("original_max_position_embeddings", longest)
            values["original_max_position_embeddings"] = original or inside
        if kind in ("yarn", "longrope"):
            values.setdefault("factor", longest / values["original_max_position_embeddings"])
            original = values["original_max_position_embeddings"]
            values.setdefault("attention_factor", _attention_factor(given, kind, values["factor"], original))
        needed = [key for key in ("factor", "short_factor", "long_factor") if key in _KEYS.get(kind, ())]
        absent = [key for key in needed if key not in values]
        if absent:
            raise ValueError(
                f"rope_type {kind!r} needs {', '.join(absent)}, which the config lacks; take config.json from the "
                "model's own folder"
            )
        return cls(**{"factor": 1.0, **values}, kind=kind)

    def to_hf(self) -> dict[str, Any]:
        """The keys of `rope_parameters` that say this."""
        values = {key: getattr(self, key) for key in _KEYS[self.kind]}
        return {"rope_type": self.kind, **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}


def _attention_factor(given: Mapping[str, Any], kind: str, factor: float, original: int) -> float:
    """What transformers multiplies cosine and sine with where the config does not say it."""
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1

    if given.get("mscale") and given.get("mscale_all_dim"):
        return scale(given["mscale"]) / scale(given["mscale_all_dim"])
    return scale(1)
