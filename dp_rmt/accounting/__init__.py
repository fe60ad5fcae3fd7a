"""Privacy accounting of DP-SGD: the epsilon of a run, and the noise that a target epsilon needs.

The unit of privacy is one example, or one user (`dp_rmt.mechanism.DPSGD`): the mathematics is the same, and the numbers
count the one or the other. Neighbours differ by adding or removing one; `epsilon_of_group` is for several. Batches are
Poisson samples. All bounds
come from Google's `dp_accounting`. This package adds Renyi accounting of truncated batches, calibration that never ends
above its target, and errors that say what to change.

The accountant "pld" composes privacy loss distributions by FFT and is nearly exact. The accountant "rdp" bounds Renyi
divergences. It is looser and faster, and serves to compare with older papers. Truncation five standard deviations above
the mean costs next to nothing under "pld" (SST-2 at epsilon 3: noise multiplier .7718 -> .7722). It costs much under
"rdp", whose bound feels the rarest event (.8321 -> 1.0937).
"""

from dp_rmt.accounting.accounted_run import AccountedRun
from dp_rmt.accounting.calibration import calibrate_noise_multiplier
from dp_rmt.accounting.composition import epsilon, epsilon_by_accountant, epsilon_curve, epsilon_of_composition
from dp_rmt.accounting.cyclic import Rounds, batch_size_without_overflow, rounds_of_run
from dp_rmt.accounting.groups import epsilon_of_group
from dp_rmt.accounting.noise_support import MAX_PARAMETERS, delta_of_truncation
from dp_rmt.accounting.renyi import composed_divergences, epsilon_of_divergences, renyi_divergences
from dp_rmt.accounting.repetition import Repetitions, divergences_of_best, epsilon_of_best
from dp_rmt.accounting.shared_samples import steps_on_shared_samples
from dp_rmt.accounting.step import Accountant, Step, Truncation, dp_event
from dp_rmt.accounting.trade_off import largest_true_positive_rate

__all__ = [
    "MAX_PARAMETERS",
    "Accountant",
    "AccountedRun",
    "Repetitions",
    "Rounds",
    "Step",
    "Truncation",
    "batch_size_without_overflow",
    "calibrate_noise_multiplier",
    "composed_divergences",
    "delta_of_truncation",
    "divergences_of_best",
    "dp_event",
    "epsilon",
    "epsilon_by_accountant",
    "epsilon_curve",
    "epsilon_of_best",
    "epsilon_of_composition",
    "epsilon_of_divergences",
    "epsilon_of_group",
    "largest_true_positive_rate",
    "renyi_divergences",
    "rounds_of_run",
    "steps_on_shared_samples",
]
