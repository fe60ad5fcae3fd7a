"""Privacy, measured: bounds on epsilon, canaries, membership, exposure, memorisation (docs/design, page 0007)."""

from dp_rmt.auditing import canaries, exposure, lower_bounds, membership, memorisation

__all__ = ["canaries", "exposure", "lower_bounds", "membership", "memorisation"]
