"""Random-matrix theory on plain arrays: no pytrees, no privacy.

A noisy matrix is `Y = G + s N`. `G` is the signal (rows m, cols n), `N` has independent standard normal entries, and
`s = noise_std` is the standard deviation of ONE entry, not divided by `sqrt(n)`. The derivations are in `docs/math.md`.
"""

from dp_rmt.random_matrix import marchenko_pastur, shrinkage, singular_values, stein, subspace, tracy_widom

__all__ = ["marchenko_pastur", "shrinkage", "singular_values", "stein", "subspace", "tracy_widom"]
