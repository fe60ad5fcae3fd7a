"""What correlated noise gains over independent noise at the same epsilon, by its number of bands."""

from __future__ import annotations

from dp_rmt.correlated_noise import CorrelatedNoiseLevel, square_root
from dp_rmt.mechanism import DPSGD
from dp_rmt.reporting.numbers import align


def compared_bands(
    *, num_examples: int, batch_size: float, num_steps: int, epsilon: float, delta: float, b1: float = 0.9
) -> str:
    """A table of the noise by the number of bands, for the terminal.

    All lines have one epsilon. The noise is that of an entry, in units of what independent noise has there: in the sum
    of the gradients so far (root mean square over the run), in one gradient at the end of the run, and in Adam's first
    moment there. Plain gradient descent stands at the sum, and a denoiser looks at the others.

    Args:
      num_examples: N.
      batch_size: B.
      num_steps: updates.
      epsilon: of the run.
      delta: of the run.
      b1: decay of the first moment.

    Returns:
      Aligned lines.

    Raises:
      ValueError: the numbers do not fit together, or no noise reaches epsilon.
    """
    lines = [["bands", "noise multiplier", "noise of sums", "of a gradient", "of the first moment", "largest batch"]]
    independent: tuple[float, ...] = ()
    most = min(num_steps, int(num_examples / batch_size))
    for bands in [2**k for k in range(most.bit_length()) if 2**k <= most]:
        strategy = square_root(bands)
        mechanism = DPSGD.calibrated(
            epsilon=epsilon,
            delta=delta,
            num_examples=num_examples,
            expected_batch_size=batch_size,
            num_steps=num_steps,
            l2_clip_norm=1.0,
            noise_strategy=strategy,
        )
        multiplier, last = mechanism.noise_multiplier, num_steps - 1
        level = CorrelatedNoiseLevel(multiplier * strategy.column_norm, strategy, num_steps)
        found = (
            multiplier * strategy.prefix_sum_error(num_steps),
            float(level(last)),
            float(level.of_decayed_sum(b1)(last)),
        )
        independent = independent or found
        ratios = [f"{own / other:.3f}" for own, other in zip(found, independent, strict=True)]
        lines.append([str(bands), f"{multiplier:.4g}", *ratios, f"{mechanism.truncation.max_batch_size:,}"])
    return align(lines)
