"""The one place that couples clipping, noise, denoising, sampling and accounting."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, get_args

import jax
import numpy as np
import optax

from dp_rmt import accounting
from dp_rmt.arguments import integer, one_of, real
from dp_rmt.batch_selection import PoissonSampling, UserSampling, max_batch_size_for, number_users
from dp_rmt.clipping.auto import auto_clipped_grad
from dp_rmt.clipping.coordinates import Coordinates
from dp_rmt.clipping.execution import AUTO, Execution
from dp_rmt.clipping.ghost import ghost_clipped_grad
from dp_rmt.clipping.per_example import ClippedGradient, ClippingStyle, check_arguments, clipped_grad, l2_norm_bound
from dp_rmt.clipping.quantile import LARGEST, SMALLEST, QuantileClipping, follow_quantile, in_units_of
from dp_rmt.correlated_noise import BandedToeplitz, CorrelatedNoiseLevel, add_correlated_noise
from dp_rmt.denoising.first_moment import scale_by_denoised_adam
from dp_rmt.denoising.gradient import denoise_matrices
from dp_rmt.noise_addition import NOISE_SUPPORT, add_gaussian_noise
from dp_rmt.random_bits import NoiseGenerator, generator_of
from dp_rmt.types import PerExampleLosses, Unit


@dataclasses.dataclass(frozen=True)
class DPSGD:
    """DP-SGD with Poisson sampling, as one consistent set of numbers and the pieces made from them.

    Formal guarantee: a run that takes the examples of `sampling(seed).indices(t)` at step t, sums their gradients by
    `clipped_grad`, adds `noise(key)` once, and uses the private data in no other way is (epsilon, delta)-differentially
    private with `epsilon(num_steps, delta)`, for neighbours that differ by one added or removed example, provided seed
    and key are secret, fresh and independent. What follows the noise (denoising, any optimizer) is post-processing.

    With `rows_per_user` the neighbours differ by all rows of one added or removed user, however many these are, for a
    run that takes the rows of `sampling(seed, users).indices(t)`. Then every number here counts users: N, B, and what
    is clipped to C, the mean gradient of a user's sampled rows (Charles et al. 2024, arXiv 2407.07737; docs/math.md).

    Attributes:
      num_examples: examples in the training set, N; users where `rows_per_user` is given.
      expected_batch_size: B = q N; the gradient is the sum of clipped gradients over B, whatever the sample's size.
      num_steps: updates in the whole run.
      noise_multiplier: std of the noise in the SUM, over l2_clip_norm; 0 switches privacy off.
      l2_clip_norm: C; may be infinite only without noise.
      clip: "flat" or "automatic".
      max_batch_size: fixed shape of a batch; None for mean + 5 sd, rounded up so that batch_multiple_of divides it.
      batch_multiple_of: what the batch shape must be divisible by, such as the number of devices or a microbatch.
      accountant: "pld" or "rdp".
      rows_per_user: None where the unit of privacy is an example. Where it is a user, the most rows of a user that one
        step takes; the guarantee does not depend on it.
      clip_quantile: lets the clip norm follow a quantile of the gradients' norms, from l2_clip_norm on; None keeps it.
        Gradients, noise_std and updates are then in units of the clip norm (`dp_rmt.clipping.quantile`), and the noise
        takes a `Counted`. The noise multiplier, and the accounting, are those of gradient and count together. Where the
        unit is a user, norms and count are those of the users' mean gradients.
      noise_generator: what the bits of the noise come from, "threefry2x32" or "chacha20", a cipher with a key of 256
        bits (`dp_rmt.random_bits`). The accounting is the same.
      noise_strategy: None for independent noise in every step. A strategy matrix of b bands correlates the noise of
        different steps (BandMF, `dp_rmt.correlated_noise`). `sampling` then lets b groups of examples take turns, and
        noise_multiplier is the std of the independent noise Z over ``l2_clip_norm`` times the norm of a column of C.

    Raises:
      ValueError: the numbers do not fit together.
    """

    num_examples: int
    expected_batch_size: float
    num_steps: int
    noise_multiplier: float
    l2_clip_norm: float
    clip: ClippingStyle = "flat"
    max_batch_size: int | None = None
    batch_multiple_of: int = 1
    accountant: accounting.Accountant = "pld"
    rows_per_user: int | None = None
    clip_quantile: QuantileClipping | None = None
    noise_generator: NoiseGenerator = "threefry2x32"
    noise_strategy: BandedToeplitz | None = None

    def __post_init__(self) -> None:
        settle = functools.partial(object.__setattr__, self)
        for name in ("num_examples", "num_steps", "batch_multiple_of"):
            settle(name, integer(name, getattr(self, name), "be at least 1 and an integer", lambda n: n >= 1))
        for name in ("max_batch_size", "rows_per_user"):
            if (size := getattr(self, name)) is not None:
                settle(name, integer(name, size, "be at least 1 and an integer, or None", lambda n: n >= 1))
        within = f"be above 0 and at most the {self.num_examples} training {self.unit}s"
        size = real("expected_batch_size", self.expected_batch_size, within, lambda b: 0 < b <= self.num_examples)
        settle("expected_batch_size", size)
        multiplier = real(
            "noise_multiplier", self.noise_multiplier, "be non-negative and finite", lambda x: 0 <= x < math.inf
        )
        settle("noise_multiplier", multiplier)
        settle("l2_clip_norm", self._validated_clip_norm())
        one_of("clip", self.clip, get_args(ClippingStyle))
        one_of("accountant", self.accountant, get_args(accounting.Accountant))
        one_of("noise_generator", self.noise_generator, get_args(NoiseGenerator))
        check_arguments(self.l2_clip_norm, self.expected_batch_size, self.clip, microbatch_size=None)
        if self.clip_quantile is not None:
            self._check_clip_quantile()
        if self.noise_strategy is not None:
            self._check_noise_strategy(self.noise_strategy)
        settle("max_batch_size", self._validated_batch_shape())

    def _check_clip_quantile(self) -> None:
        if self.noise_multiplier == 0 or self.clip != "flat" or not SMALLEST <= self.l2_clip_norm <= LARGEST:
            raise ValueError(
                f"clip_quantile needs noise, clip='flat' and an l2_clip_norm in [{SMALLEST:g}, {LARGEST:g}] to begin "
                f"with, got noise_multiplier={self.noise_multiplier}, clip={self.clip!r}, "
                f"l2_clip_norm={self.l2_clip_norm}: leave clip_quantile out, or change these"
            )

    def _check_noise_strategy(self, strategy: BandedToeplitz) -> None:
        together = {"clip_quantile": self.clip_quantile, "rows_per_user": self.rows_per_user}
        for name, why in (
            ("clip_quantile", "the count's noise would have to be correlated as that of the gradient"),
            ("rows_per_user", "that users take turns as examples do is not tested"),
        ):
            if together[name] is not None:
                raise ValueError(f"noise_strategy and {name}: {why}, so it is not promised; leave one of them out")
        if self.noise_multiplier == 0:
            raise ValueError("noise_strategy needs noise, got noise_multiplier=0: leave noise_strategy out")
        if strategy.bands * self.expected_batch_size > self.num_examples * (1 + 1e-9):
            raise ValueError(
                f"noise_strategy has {strategy.bands} bands, so that a step samples one of {strategy.bands} groups of "
                f"{self.num_examples / strategy.bands:.6g} examples each, which do not fill a batch of "
                f"{self.expected_batch_size:g}: let it have at most "
                f"{int(self.num_examples / self.expected_batch_size)} bands, or lower expected_batch_size"
            )

    def _validated_clip_norm(self) -> float:
        if self.noise_multiplier == 0:
            return real("l2_clip_norm", self.l2_clip_norm, "be positive", lambda c: c > 0)
        wanted = "be positive and finite: without a bound on each example's gradient no amount of noise is private"
        return real("l2_clip_norm", self.l2_clip_norm, wanted, lambda c: 0 < c < math.inf)

    def _validated_batch_shape(self) -> int:
        if self.max_batch_size is None and self.num_groups > 1:
            return accounting.batch_size_without_overflow(
                self.num_examples, self.sampling_probability, self.num_steps, multiple_of=self.batch_multiple_of
            )
        if self.max_batch_size is None:
            return max_batch_size_for(self.num_examples, self.sampling_probability, multiple_of=self.batch_multiple_of)
        if self.max_batch_size % (multiple := self.batch_multiple_of):
            raise ValueError(
                f"max_batch_size {self.max_batch_size} must be a multiple of {multiple} (batch_multiple_of): "
                f"give {-(-self.max_batch_size // multiple) * multiple}, or None"
            )
        return self.max_batch_size

    @classmethod
    def calibrated(cls, *, epsilon: float, delta: float, **settings: Any) -> DPSGD:
        """The mechanism with the smallest noise multiplier that reaches (epsilon, delta) after num_steps.

        Args:
          epsilon: target, positive.
          delta: target, in (0, 1).
          **settings: the other attributes of `DPSGD`.

        Returns:
          A `DPSGD`.

        Raises:
          ValueError: no noise multiplier reaches the target, or a setting is out of range.
          TypeError: a setting is no attribute, or one without a default is missing.
        """
        fields = [field.name for field in dataclasses.fields(cls) if field.name != "noise_multiplier"]
        if unknown := settings.keys() - set(fields):
            raise TypeError(
                f"DPSGD.calibrated: unknown setting {', '.join(sorted(unknown))}; give epsilon, delta and some of "
                f"{', '.join(fields)}; noise_multiplier is what it finds"
            )
        draft = cls(noise_multiplier=1.0, **settings)  # checks all that is given, before the search
        run = draft._run(draft.num_steps)
        noise_multiplier = run.calibrated_noise_multiplier(epsilon, delta, draft.accountant)
        return dataclasses.replace(draft, noise_multiplier=noise_multiplier)

    @property
    def unit(self) -> Unit:
        """What the numbers count, and whose privacy the guarantee is: an example's or a user's."""
        return "example" if self.rows_per_user is None else "user"

    @property
    def sampling_probability(self) -> float:
        """q, the probability with which a step uses an example, or a user."""
        return self.expected_batch_size / self.num_examples

    @property
    def truncation(self) -> accounting.Truncation:
        """The fixed batch shape, as the accountant sees it."""
        assert self.max_batch_size is not None  # set in __post_init__
        return accounting.Truncation(num_examples=self.num_examples, max_batch_size=self.max_batch_size)

    @property
    def num_groups(self) -> int:
        """b, in how many groups the examples take turns; 1 where every step samples all of them."""
        return 1 if self.noise_strategy is None else self.noise_strategy.bands

    @property
    def noise_std(self) -> float:
        """Std of the noise in ONE entry of the gradient, for both noise and denoiser.

        ``noise_multiplier * C / B``: the multiplier times what one example can add to the clipped gradient.

        Raises:
          ValueError: with `noise_strategy` it differs from step to step; see `noise_level`.
        """
        if self.noise_strategy is not None:
            raise ValueError(
                "with noise_strategy the noise has another std in each step, and is not independent over steps: give "
                "noise_level, in the place of noise_std, to whatever takes a number or a schedule"
            )
        return self._independent_noise_std

    @property
    def noise_level(self) -> float | CorrelatedNoiseLevel:
        """The std of the noise in ONE entry of the gradient as functions with an argument ``noise_std`` take it."""
        if self.noise_strategy is None:
            return self.noise_std
        return CorrelatedNoiseLevel(self._independent_noise_std, self.noise_strategy, self.num_steps)

    @property
    def largest_noise_std(self) -> float:
        """The largest std of the noise in ONE entry of the gradient over the steps of the run."""
        level = self.noise_level
        return level if isinstance(level, float) else float(level(self.num_steps - 1))

    @property
    def _independent_noise_std(self) -> float:
        """Std of one entry of the noise that is independent over steps, Z with `noise_strategy`."""
        if self.noise_multiplier == 0:
            return 0.0
        if self.clip_quantile is not None:  # in units of the clip norm, whatever it is
            return self.clip_quantile.noise_multipliers(self.noise_multiplier)[0] / self.expected_batch_size
        norm = 1.0 if self.noise_strategy is None else self.noise_strategy.column_norm
        return (
            self.noise_multiplier
            * norm
            * l2_norm_bound(l2_clip_norm=self.l2_clip_norm, normalize_by=self.expected_batch_size)
        )

    def clipped_grad(
        self,
        per_example_losses: PerExampleLosses,
        execution: Execution = AUTO,
        coordinates: Coordinates | None = None,
        clip_norm: jax.Array | None = None,
    ) -> ClippedGradient:
        """The clipped gradient, normalised by the expected batch size.

        Args:
          per_example_losses: ``(params, batch) -> (batch,)``.
          execution: how it is computed; "auto" microbatches are the whole batch here.
          coordinates: public maps in whose coordinates it is clipped (`dp_rmt.clipping.coordinates`); the noise of the
            same std is then white in them. None for the parameters as they are.
          clip_norm: with `clip_quantile`, the clip norm in the state of the noise; losses, norms and gradients are then
            in its units. Else None.

        Returns:
          A `ClippedGradient`.

        Raises:
          ValueError: clip_norm is given without `clip_quantile`, or missing with it.
        """
        if (clip_norm is None) != (self.clip_quantile is None):
            raise ValueError(
                "clip_norm belongs to clip_quantile: give the l2_clip_norm of the noise's QuantileClippingState with "
                f"it, and None without it, got clip_norm={clip_norm!r}, clip_quantile={self.clip_quantile!r}"
            )
        if clip_norm is not None:
            per_example_losses = in_units_of(per_example_losses, clip_norm)
        size = execution.microbatch_size
        arguments: dict[str, Any] = {
            "l2_clip_norm": self.l2_clip_norm if clip_norm is None else 1.0,
            "normalize_by": self.expected_batch_size,
            "clip": self.clip,
            "microbatch_size": None if size == "auto" else size,
            "coordinates": coordinates,
            "unit": self.unit,
        }
        if execution.clipping_method == "vmap":
            return clipped_grad(per_example_losses, **arguments)
        if execution.clipping_method == "auto":
            return auto_clipped_grad(per_example_losses, **arguments)
        return ghost_clipped_grad(per_example_losses, method=execution.clipping_method, **arguments)

    def noise(self, key: jax.Array) -> optax.GradientTransformation:
        """The noise that makes the clipped gradient private; with `clip_quantile` that of a `Counted`.

        Raises:
          ValueError: the key is not one of the mechanism's `noise_generator`.
        """
        if (given := generator_of(key)) != self.noise_generator:
            raise ValueError(
                f"the mechanism's noise_generator is {self.noise_generator!r}, and the key is one of {given!r}: give "
                "noise_key(seed, mechanism.noise_generator), or change the mechanism"
            )
        if self.clip_quantile is not None:
            return follow_quantile(
                self.clip_quantile,
                noise_multiplier=self.noise_multiplier,
                l2_clip_norm=self.l2_clip_norm,
                normalize_by=self.expected_batch_size,
                key=key,
            )
        if self.noise_strategy is not None:
            return add_correlated_noise(self._independent_noise_std, self.noise_strategy, key)
        return add_gaussian_noise(self.noise_std, key)

    def denoiser(self, **options: Any) -> optax.GradientTransformation:
        """`denoise_matrices` at the noise level of this mechanism; options as there."""
        return denoise_matrices(self.noise_level, **options)

    def denoised_adam(self, **options: Any) -> optax.GradientTransformation:
        """`scale_by_denoised_adam` at the noise level of this mechanism; options as there."""
        return scale_by_denoised_adam(self.noise_level, **options)

    def sampling(self, seed: int, users: Sequence[Any] | np.ndarray | None = None) -> PoissonSampling | UserSampling:
        """The sampler that the accounting assumes.

        Args:
          seed: of the samples.
          users: an id for each row of the data, where the unit is a user.

        Raises:
          ValueError: users are missing, are not as many as the mechanism accounts for, or the unit is an example.
        """
        self.check_users(users)
        arguments = self.sampling_probability, self.truncation.max_batch_size
        if users is None or self.rows_per_user is None:
            return PoissonSampling(self.num_examples, *arguments, seed, self.num_groups)
        return UserSampling(users, *arguments, self.rows_per_user, seed)

    def check_users(self, users: Sequence[Any] | np.ndarray | None) -> None:
        """Raises ValueError unless users are given where they are the unit, and as many as are accounted for.

        Args:
          users: an id for each row of the data; None where the unit is an example.
        """
        if (users is None) != (self.unit == "example"):
            raise ValueError(
                "users: the ids of the rows' users and rows_per_user go together. Give users=ids with "
                "DPSGD(rows_per_user=...), whose unit of privacy is a user, or neither of them"
            )
        if users is not None and (found := int(number_users(users).max()) + 1) != self.num_examples:
            raise ValueError(
                f"the mechanism accounts for {self.num_examples:,} users and the data has {found:,}: with "
                f"rows_per_user, num_examples counts users, so give num_examples={found}"
            )

    def epsilon(self, step: int, delta: float, accountant: accounting.Accountant | None = None) -> float:
        """The epsilon spent after `step` updates; infinite without noise, 0 before the first update."""
        return 0.0 if step == 0 else self._run(step).epsilon(delta, accountant or self.accountant)

    def epsilon_by_accountant(self, step: int, delta: float) -> dict[str, float]:
        """The bound of each accountant alone after `step` updates, by its name; see the function in `accounting`."""
        if step == 0:
            return dict.fromkeys(get_args(accounting.Accountant), 0.0)
        return self._run(step).epsilon_by_accountant(delta)

    def delta_of_truncation(self, step: int) -> float:
        """The part of delta after `step` updates that pays for what the accountants do not see; `epsilon` has it in.

        That is the end of the noise's support and, with `noise_strategy`, batches that overflow.
        """
        return 0.0 if step == 0 else self._run(step).delta_of_truncation()

    def largest_true_positive_rate(self, step: int, false_positive_rate: float) -> float:
        """What a membership test of this rate of false alarms detects, at most, after `step` updates."""
        return false_positive_rate if step == 0 else self._run(step).largest_true_positive_rate(false_positive_rate)

    def _run(self, step: int) -> accounting.AccountedRun:
        """`step` updates, as the accountants see them."""
        return accounting.AccountedRun(
            self.noise_multiplier, self.sampling_probability, step, self.truncation, NOISE_SUPPORT, self.num_groups
        )
