"""The words of the privacy statement: what is guaranteed, to whom, and what is not."""

from __future__ import annotations

import math
import re

from dp_rmt.reporting import mechanism_text
from dp_rmt.reporting.numbers import number, percent
from dp_rmt.reporting.privacy_statement import PrivacyStatement
from dp_rmt.reporting.provenance import Provenance

FALSE_ALARMS = (0.001, 0.01, 0.1)
"""The false-alarm rates at which the statement says what can be detected."""

RELEASE = "What may be released"
"""The heading of the section that speaks of the files of a run's folder."""

Section = tuple[str, list[str]]
"""A heading and its paragraphs, with Markdown's `code` and **bold** only."""


def sections(statement: PrivacyStatement) -> list[Section]:
    """The text of the statement, heading by heading."""
    audit = [("What an audit measured", _audit(statement))] if statement.audit is not None else []
    about = [("What this is about", _subject(statement.about, statement))] if statement.about is not None else []
    if not statement.is_private:
        return [("This run is NOT private", _not_private(statement)), *about, *audit]
    return [
        *about,
        ("The guarantee", _guarantee(statement)),
        *audit,
        ("What it rests on", _conditions(statement)),
        (RELEASE, _release(statement)),
        ("What is not covered", _not_covered(statement)),
    ]


def _not_private(statement: PrivacyStatement) -> list[str]:
    reason = "no noise was added" if statement.noise_multiplier == 0 else "no finite ε holds"
    return _paragraphs(f"""
        **There is no privacy guarantee: {reason}.** The model, the checkpoints, `metrics.jsonl` and
        `report.html` may reveal any of the {statement.num_examples:,} training {statement.unit}s. Treat them all as
        you treat the data.

        {_verbatim(statement)}
    """)


def _guarantee(statement: PrivacyStatement) -> list[str]:
    epsilon, delta = float(statement.epsilon or 0.0), float(statement.delta or 0.0)
    steps, bound = f"{statement.num_steps:,}", statement.is_upper_bound
    after = f"**This run has done at most {steps} updates.** After so many it"
    after = after if bound else f"After {steps} updates this run"
    one, others, away = ("one example", "examples", "an example")
    if statement.unit == "user":
        one, others, away = ("one person", "people", "a person's rows")
    text = f"""
        {after} is **(ε, δ)-differentially private with ε = {number(epsilon, "up")} and δ = {number(delta, "up")}**. The
        unit is **{statement.unit_in_words}**; neighbouring data sets differ by adding or removing one.
    """
    if bound:
        text += """
        **The number is an upper bound.** Each update is announced here before it is computed, and the run is still
        under way, or was ended without being able to say how far it came. The same command goes on from its last
        checkpoint.
        """
    text += f"""
        In words: take anyone who sees everything that was released, knows all other {others}, and wants to tell whether
        {one} was in the training data. {_detection(statement)}

        ε bounds how much likelier any result becomes by the presence or the absence of {one} (by a factor of at
        most e^ε), and δ bounds the probability by which this may fail, in the worst case by giving {away} away.
    """
    if statement.selected_among is not None:
        text += f"""
        **This model was chosen as the best of a secret random number of runs** ({statement.selected_among}), and ε is
        that of the choice: the winner alone is published, by Rényi divergences (Papernot & Steinke 2022). It holds as
        long as the number of runs, their table and all other models stay secret.
        """
    if statement.epsilon_pld is not None and statement.epsilon_rdp is not None:
        text += f"""
        Two accountants bound the same run. ε = {number(statement.epsilon_pld, "up")} by privacy loss distributions
        (PLD), which add up the distribution of what each update reveals numerically and are nearly exact.
        ε = {number(statement.epsilon_rdp, "up")} by Rényi divergences (RDP), which add up moments of it, are looser,
        and are what older papers quote. Both hold; quote one, with its name.
        """
    if statement.target_epsilon is not None:
        relation = "above" if epsilon > statement.target_epsilon * (1 + 1e-9) else "within"
        text += f"""
        The spent ε is **{relation}** the ε = {number(statement.target_epsilon, "up")} that was aimed at.
        """
    if statement.delta_of_truncation is not None:
        text += f"""
        The noise reaches only so far, as every number in a computer does. What a Gaussian would do beyond its end is
        counted as failure{_overflow(statement)}. It costs a δ of at most
        {number(statement.delta_of_truncation, "up")}, which the δ above contains.
        """
    if delta * statement.num_examples >= 1:
        text += f"""
        **δ is too large.** At δ ≥ 1/{statement.num_examples:,} the guarantee allows publishing {away}
        outright; choose δ well below one over the number of {statement.unit}s.
        """
    return _paragraphs(text)


def _overflow(statement: PrivacyStatement) -> str:
    """What else counts as failure where groups of examples take turns."""
    return "" if statement.num_groups == 1 else ", and so is a sample that does not fit into its batch"


def _detection(statement: PrivacyStatement) -> str:
    """What a test can detect, by the mechanism's trade-off curve; by (epsilon, delta) where a statement lacks it."""
    epsilon, delta = float(statement.epsilon or 0.0), float(statement.delta or 0.0)
    rates = [rate for rate, _ in statement.detection] or FALSE_ALARMS
    powers = [power for _, power in statement.detection] or [
        attack_power(epsilon=epsilon, delta=delta, false_positive_rate=rate) for rate in rates
    ]
    first, *others = (percent(power) for power in powers)
    units = "examples" if statement.unit == "example" else "people"
    text = f"A test that wrongly accuses at most {percent(rates[0])} of absent {units} detects at most {first} "
    text += "of present ones"
    for rate, power in zip(rates[1:], others, strict=True):
        text += f"; at {percent(rate)} it detects at most {power}"
    curve = "the trade-off curve of the mechanism itself" if statement.detection else "ε and δ alone"
    return f"{text}. These are bounds from {curve}."


def _subject(about: Provenance, statement: PrivacyStatement) -> list[str]:
    """What was trained, on what, by which code; what is not known is left out."""
    model = f" `{about.base_model}`" if about.base_model else ""
    tuning = f" (trained: `{about.tuning}`)" if about.tuning else ""
    task = f" of the task `{about.task}`" if about.task else ""
    rows = ", each with all rows of one person," if statement.unit == "user" else ""
    text = f"""
        The pre-trained model{model}{tuning} was fine-tuned on {statement.num_examples:,} {statement.unit}s{rows}{task}.
    """
    if about.data_fingerprint is not None:
        text += f"""
        Fingerprint of the training data: `{about.data_fingerprint}`, an HMAC-SHA256 of the tokenised rows under the
        secret id of the run. Whoever has the data and the run's `ledger.jsonl` can confirm it; nobody else can try
        guesses of the data on it.
        """
    version = f" by dp_rmt {about.version}" if about.version else ""
    commit = f", commit `{about.commit}`" if about.commit else ""
    if statement.date or version or commit:
        text += f"""
        Last written{f" on {statement.date}" if statement.date else ""}{version}{commit}.
        """
    if about.command:
        text += f"""
        Command: `{about.command}`
        """
    return _paragraphs(text)


def _audit(statement: PrivacyStatement) -> list[str]:
    audit = statement.audit
    assert audit is not None
    text = f"""
        An attack on {audit.subject} shows **ε ≥ {number(audit.epsilon, "down")}** at δ = {number(audit.delta)}, with
        {100 * audit.confidence:g}% confidence. A lower bound is no guarantee: it says what this attack could
        show, and that no larger mistake was found.
    """
    if not audit.is_this_run:
        text += f"""
        **Not this run was attacked**, but the same code on a small problem with a noise multiplier of
        {number(audit.noise_multiplier)}, sampling probability {number(audit.sampling_probability)} and
        {audit.num_steps:,} updates. Mistakes in what is particular to this run (its model, its data) do not
        show there.
        """
    mine = statement.noise_multiplier, statement.sampling_probability, statement.num_steps
    if not all(map(math.isclose, mine, (audit.noise_multiplier, audit.sampling_probability, audit.num_steps))):
        text += """
        **These are not the settings of this run as it stands**: repeat the audit.
        """
    elif statement.is_private and audit.epsilon > float(statement.epsilon or 0.0):
        text += """
        **The bound is above the proven ε: the code or the proof is wrong. Do not rely on the guarantee.**
        """
    return _paragraphs(text)


def _conditions(statement: PrivacyStatement) -> list[str]:
    seeds = {
        "os entropy": "They were drawn from the operating system's entropy.",
        "given in the config": """**They were given in the config, or by whoever called the training: the noise
        can be reproduced, and for anyone who knows the seeds the guarantee is void.** Keep them secret, and
        `config.json` where it has them; or leave the seeds unset.""",
    }[statement.seeds_from]
    coordinates = ""
    if statement.coordinates_from is not None:
        coordinates = f"""
        Gradients or updates are taken in coordinates that were computed from {statement.coordinates_from}
        before training. **These rows must be public**: nothing accounts for what the coordinates say of them.
        """
    sampled = ""
    if statement.unit == "user":
        sampled = f"""
        Of a user that is drawn, a step takes all rows, or {statement.rows_per_user} at random of more.
        **Who is a person is what the data's user column says**: two ids of one person are two users here.
        """
    return _paragraphs(f"""
        {mechanism_text.sampling(statement)}

        {sampled}

        {mechanism_text.clipping(statement)} What follows (denoising, the optimizer) sees only the noisy sum and costs
        no privacy.

        {coordinates}

        The seeds of sampling and noise stay secret and are used for this run only. {seeds}
        {mechanism_text.generator(statement)}

        The number of training {statement.unit}s, {statement.num_examples:,}, is taken as public.
    """)


def _release(statement: PrivacyStatement) -> list[str]:
    metrics = (
        """**Keep `metrics.jsonl` and `report.html` private**: the values named `nonprivate/...` were computed
        from raw examples, outside the guarantee. Switch them off for records that are to be published."""
        if statement.nonprivate_metrics
        else """Losses, norms and cosines of raw training examples were not recorded: what `metrics.jsonl`
        and `report.html` say of the training data comes from the noisy gradients, but for `seconds`
        (timing)."""
    )
    return _paragraphs(f"""
        The sequence of noisy gradients is what the accounting treats as released, hence every model
        computed from it: **release `model/` only**.

        **Never release `checkpoints/`**: they hold the key of the noise and the seed of the sampler;
        whoever has them can subtract the noise. **Keep `ledger.jsonl`, and keep it to yourself**: it remembers what was
        spent, and confirms guesses of the whole data set.

        {metrics}

        {_verbatim(statement)}
    """)


def _verbatim(statement: PrivacyStatement) -> str:
    if statement.texts_of is None:
        return ""
    return f"""**`texts.jsonl` and `report.html` show rows of `{statement.texts_of}` word for word**, beside what the
        model wrote for them: they are as private as that data."""


def _not_covered(statement: PrivacyStatement) -> list[str]:
    names = ", ".join(f"`{name}`" for name in statement.evaluation_data)
    several = """
        **People with several examples.** With k of them, or k near-duplicates, a person has k ε (and a
        larger δ). Name the people (`data.user_column`), and the unit is a person.
    """
    if statement.unit == "user":
        several = """
        **What others say of a person.** The guarantee hides the rows that stand under a person's id, and not what
        stands in the rows of others, nor what is true of many people together.
        """
    choices = """**Choices made by looking at results.** Hyper-parameters, and the choice of a model among several,
        may depend on the data."""
    evaluation = f"""**The evaluation data**{f" (here {names})" if names else ""}. Scores are computed without noise; if
        these data are private, so are the scores."""
    if statement.evaluation_guarantee is not None:
        epsilon, delta, std, count = statement.evaluation_guarantee
        evaluation = f"""**Rows that are in several data sets.** The evaluation data (here {names}) has a
        guarantee of its own: each of its rows has (ε = {number(epsilon, "up")}, δ = {number(delta, "up")}), for
        all scores together. There are {count:,} evaluations at most. Of each the accuracy alone is released, and the
        number of right answers has Gaussian noise of {number(std)} rows. The numbers of rows are public. A row that is
        in two of these data sets, or in the training data, too, has the sum of their ε. These rows are the unit here
        also where a person is that of training: a person with several of them has a weaker guarantee."""
    if statement.compares_raw_losses:
        choices = """**The choice that this run was made for.** It is one of several whose raw training losses are
        compared, to choose a learning rate. No noise hides them, and no ε counts the choice: **it is for public data
        only**."""
    if statement.selected_among is not None:
        choices = """**Other choices made by looking at results.** The choice of this run among its own sweep is
        covered; how that sweep was set up may depend on the data."""
    return _paragraphs(f"""
        **Other runs on the same data.** Every further run (an arm, a sweep, a repetition) spends its own ε,
        and they add up. Runs that share seeds share noise, which cancels in their difference: of such runs
        release at most one.

        {choices}

        {evaluation}

        {several}

        **The pre-trained model and the tokenizer**, which were made from other data.

        **Attacks on the implementation.** The noise is a continuous Gaussian in float32 arithmetic: there
        is no protection against attacks on its lowest bits, nor against attacks by timing.
    """)


def _paragraphs(text: str) -> list[str]:
    """The paragraphs of a text, which blank lines separate, each on one line."""
    return [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text.strip()) if paragraph.strip()]


def attack_power(*, epsilon: float, delta: float, false_positive_rate: float) -> float:
    """The largest true positive rate of a membership test at a false positive rate, under (epsilon, delta).

    ``min(e^eps a + delta, 1 - e^-eps (1 - delta - a), 1)`` (Wasserman & Zhou 2010; Kairouz, Oh & Viswanath
    2015).

    Args:
      epsilon: at least 0.
      delta: in [0, 1).
      false_positive_rate: a, in [0, 1].

    Returns:
      The bound on the true positive rate, in [0, 1].

    >>> attack_power(epsilon=0.0, delta=0.0, false_positive_rate=0.25)
    0.25
    >>> round(attack_power(epsilon=3.0, delta=1e-5, false_positive_rate=0.01), 4)
    0.2009
    """
    amplified = math.exp(min(epsilon, 700.0)) * false_positive_rate + delta
    mirrored = 1.0 - math.exp(-epsilon) * (1.0 - delta - false_positive_rate)
    return max(0.0, min(amplified, mirrored, 1.0))
