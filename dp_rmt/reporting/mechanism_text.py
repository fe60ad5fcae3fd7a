"""What a step of the mechanism does, in the words of the privacy statement."""

from __future__ import annotations

import math

from dp_rmt.reporting.numbers import number, percent
from dp_rmt.reporting.privacy_statement import PrivacyStatement


def generator(statement: PrivacyStatement) -> str:
    """Where the bits of the noise come from."""
    if statement.noise_generator == "chacha20":
        return """The noise came from ChaCha20 (RFC 8439), a cipher, with a key of 256 bits that is made
        from a seed of 128 bits."""
    return """The noise came from Threefry-2x32 with a key of 64 bits. It passes tests of randomness but is no cipher:
        that nobody finds the key, or the rest of the noise, from a part of it is an assumption."""


def sampling(statement: PrivacyStatement) -> str:
    """Who is drawn in a step."""
    q, size, groups = statement.sampling_probability, f"{statement.max_batch_size:,}", statement.num_groups
    if groups == 1:
        return f"""Each step draws every {statement.unit} independently with probability {number(q)}
        (Poisson sampling). A sample of more than {size} is cut to a random subset, which ε accounts for."""
    return f"""Every {statement.unit} belongs to one of {groups} groups at random for the whole run, and the groups take
        turns. Each step draws every {statement.unit} of its group independently with probability {number(groups * q)}
        (cyclic Poisson sampling), so that none is drawn twice in any {groups} steps. A sample of more than {size} is
        cut to a random subset; the probability of this is a part of δ."""


def clipping(statement: PrivacyStatement) -> str:
    """What is clipped and what gets noise."""
    norm, multiplier = number(statement.l2_clip_norm), statement.noise_multiplier
    whose = "example's gradient" if statement.unit == "example" else "user's gradient, the mean over the rows taken,"
    if statement.num_groups > 1:
        return f"""Each {whose} is clipped to norm {norm}. **The noise of a step is correlated with that of earlier
        steps** (BandMF with {statement.num_groups} bands, Choquette-Choo et al. 2023), so that much of it cancels over
        the run. Multiplied by the strategy matrix, which is public, the gradients of all steps together have
        independent Gaussian noise of {number(multiplier)} times {norm} times the norm of a column of that matrix."""
    if statement.clip_quantile is None:
        return f"""Each {whose} is clipped to norm {norm}; the sum gets Gaussian noise of
        {number(multiplier)} times that norm, once per step."""
    quantile, share = statement.clip_quantile
    return f"""Each {whose} is clipped to a norm that begins at {norm} and follows the
        {number(quantile)}-quantile of the gradients' norms (Andrew et al. 2021). Once per step the sum gets Gaussian
        noise of {number(multiplier / math.sqrt(1 - share))} times that norm, and the number of gradients below the
        norm gets noise of its own, for which {percent(share)} of the budget is set apart: together they are one
        Gaussian mechanism of noise multiplier {number(multiplier)}, which ε accounts for."""
