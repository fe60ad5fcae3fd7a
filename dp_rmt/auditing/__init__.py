"""Privacy, measured: lower bounds on epsilon, canaries, membership inference, exposure (docs/design/0007-*.md)."""

from dp_rmt.auditing import canaries, exposure, lower_bounds, membership

__all__ = ["canaries", "exposure", "lower_bounds", "membership"]
