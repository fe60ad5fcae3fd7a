"""The one place that couples clipping, noise, denoising, sampling and accounting."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import optax

from dp_rmt import accounting
from dp_rmt.batch_selection import PoissonSampling, max_batch_size_for
from dp_rmt.clipping import ClippedGradient, ClippingStyle, clipped_grad
from dp_rmt.denoised_adam import scale_by_denoised_adam
from dp_rmt.denoising import denoise_matrices
from dp_rmt.ghost_clipping import ghost_clipped_grad
from dp_rmt.noise_addition import add_gaussian_noise
from dp_rmt.types import PerExampleLosses

ClippingMethod = Literal["vmap", "auto", "bookkeeping", "ghost"]


@dataclasses.dataclass(frozen=True)
class DPSGD:
    """DP-SGD with Poisson sampling, as one consistent set of numbers and the pieces made from them.

    Formal guarantee: a run that takes the examples of `sampling(seed).indices(t)` at step t, sums their gradients by
    `clipped_grad`, adds `noise(key)` once, and uses the private data in no other way is (epsilon, delta)-differentially
    private with `epsilon(num_steps, delta)`, for neighbours that differ by one added or removed example, provided seed
    and key are secret, fresh and independent. What follows the noise (denoising, any optimizer) is post-processing.

    Attributes:
      num_examples: examples in the training set, N.
      expected_batch_size: B = q N; the gradient is the sum of clipped gradients over B, whatever the sample's size.
      num_steps: updates in the whole run.
      noise_multiplier: std of the noise in the SUM, over l2_clip_norm; 0 switches privacy off.
      l2_clip_norm: C; may be infinite only without noise.
      clip: "flat" or "automatic".
      max_batch_size: fixed shape of a batch; None for mean + 5 sd rounded up to a multiple of batch_multiple_of.
      batch_multiple_of: what the batch shape must be divisible by: devices times microbatch_size.
      microbatch_size: examples differentiated at once; None for all.
      clipping_method: "vmap" (any model), or "auto", "bookkeeping" or "ghost" (Flax models of stock layers, at little
        more than the cost of a plain gradient; see `ghost_clipped_grad`).
      accountant: "pld" or "rdp".

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
    microbatch_size: int | None = None
    clipping_method: ClippingMethod = "vmap"
    accountant: accounting.Accountant = "pld"

    def __post_init__(self) -> None:
        if not 0 < self.expected_batch_size <= self.num_examples:
            raise ValueError(
                f"expected_batch_size must be above 0 and at most the {self.num_examples} training examples, "
                f"got {self.expected_batch_size}"
            )
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")
        if not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier must be non-negative and finite, got {self.noise_multiplier}")
        if self.noise_multiplier > 0 and not 0 < self.l2_clip_norm < math.inf:
            raise ValueError(
                f"l2_clip_norm must be positive and finite, got {self.l2_clip_norm}: without a bound on each example's "
                "gradient no amount of noise is private"
            )
        if self.clipping_method not in (methods := get_args(ClippingMethod)):
            raise ValueError(f"clipping_method must be one of {', '.join(methods)}; got {self.clipping_method!r}")
        if self.max_batch_size is None:
            size = max_batch_size_for(
                self.num_examples, self.sampling_probability, multiple_of=self.batch_multiple_of
            )
            object.__setattr__(self, "max_batch_size", size)
        elif self.max_batch_size % self.batch_multiple_of:
            raise ValueError(
                f"max_batch_size {self.max_batch_size} must be a multiple of {self.batch_multiple_of} "
                "(devices times microbatch size)"
            )

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
        """
        draft = cls(noise_multiplier=0.0, **settings)
        noise_multiplier = accounting.calibrate_noise_multiplier(
            epsilon=epsilon,
            delta=delta,
            sampling_probability=draft.sampling_probability,
            num_steps=draft.num_steps,
            accountant=draft.accountant,
            truncation=draft.truncation,
        )
        return dataclasses.replace(draft, noise_multiplier=noise_multiplier)

    @property
    def sampling_probability(self) -> float:
        """q, the probability with which a step uses an example."""
        return self.expected_batch_size / self.num_examples

    @property
    def truncation(self) -> accounting.Truncation:
        """The fixed batch shape, as the accountant sees it."""
        assert self.max_batch_size is not None  # set in __post_init__
        return accounting.Truncation(num_examples=self.num_examples, max_batch_size=self.max_batch_size)

    @property
    def noise_std(self) -> float:
        """Std of the noise in ONE entry of the gradient, ``noise_multiplier * C / B``, for both noise and denoiser."""
        if self.noise_multiplier == 0:
            return 0.0
        return self.noise_multiplier * self.clipped_grad(lambda params, batch: batch).sensitivity()

    def clipped_grad(self, per_example_losses: PerExampleLosses) -> ClippedGradient:
        """The clipped gradient, normalised by the expected batch size."""
        arguments: dict[str, Any] = {
            "l2_clip_norm": self.l2_clip_norm,
            "normalize_by": self.expected_batch_size,
            "clip": self.clip,
            "microbatch_size": self.microbatch_size,
        }
        if self.clipping_method == "vmap":
            return clipped_grad(per_example_losses, **arguments)
        return ghost_clipped_grad(per_example_losses, method=self.clipping_method, **arguments)

    def noise(self, key: jax.Array) -> optax.GradientTransformation:
        """The noise that makes the clipped gradient private."""
        return add_gaussian_noise(self.noise_std, key)

    def denoiser(self, **options: Any) -> optax.GradientTransformation:
        """`denoise_matrices` at the noise level of this mechanism; options as there."""
        return denoise_matrices(self.noise_std, **options)

    def denoised_adam(self, **options: Any) -> optax.GradientTransformation:
        """`scale_by_denoised_adam` at the noise level of this mechanism; options as there."""
        return scale_by_denoised_adam(self.noise_std, **options)

    def sampling(self, seed: int) -> PoissonSampling:
        """The sampler that the accounting assumes."""
        return PoissonSampling(
            self.num_examples, self.sampling_probability, self.truncation.max_batch_size, seed
        )

    def epsilon(self, step: int, delta: float, accountant: accounting.Accountant | None = None) -> float:
        """The epsilon spent after `step` updates; infinite without noise, 0 before the first update."""
        if step == 0:
            return 0.0
        return accounting.epsilon(
            noise_multiplier=self.noise_multiplier,
            delta=delta,
            sampling_probability=self.sampling_probability,
            num_steps=step,
            accountant=accountant or self.accountant,
            truncation=self.truncation,
        )
