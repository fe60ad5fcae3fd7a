# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Auditing what you trained
#
# A privacy statement is a proof on paper. An audit attacks the trained model itself, and asks two questions. A data
# owner asks: can somebody find out that my row was in the training data? A researcher asks: is the code as private as
# its proof says? An attack can refute a statement. It can never prove one, since a better attack may come.
#
# The page trains one small model three times on the same 500 rows, and attacks it each time.

# %%
from dp_rmt import environment

environment.prepare()  # settings of XLA, before JAX is imported

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import dp_rmt
from dp_rmt.auditing import canaries, lower_bounds, membership
from dp_rmt.noise_addition import noise_key

# %% [markdown]
# ## Rows that can only be memorised
#
# The labels are coin tosses. Nothing in the data is there to be learned but the rows themselves, which is the worst
# case for privacy. Such rows are called canaries. Another coin decides for each of them whether it is trained on, and
# the attacker must guess how that coin fell.

# %%
NUM_ROWS, WIDTH, NUM_STEPS, DELTA = 500, 2048, 30, 1e-5
rng = np.random.default_rng(0)
rows = {
    "x": rng.standard_normal((NUM_ROWS, WIDTH)).astype(np.float32),
    "label": rng.integers(0, 2, NUM_ROWS).astype(np.float32),
}
is_member = canaries.coin_flips(NUM_ROWS, seed=1)
print(f"{is_member.sum()} of {NUM_ROWS} rows are trained on")


def losses(params, batch):
    logits = jnp.tanh(batch["x"] @ params["hidden"]) @ params["out"]
    return optax.sigmoid_binary_cross_entropy(logits, batch["label"])


def first_params():
    first, second = jax.random.split(jax.random.key(0))
    return {
        "hidden": jax.random.normal(first, (WIDTH, 8)) / WIDTH**0.5,
        "out": jax.random.normal(second, (8,)) / 8**0.5,
    }


# %% [markdown]
# ## Train, and let the attacker watch
#
# The attacker sees what the guarantee covers, which is all that is released: the model after every step, and the
# noisy gradient that led there. The white-box score of a row says how much of the row's own gradient is in those. The
# black-box score says by how much the row's loss fell. Rows that are left out are handled as padding, so that the
# number of rows that were trained on is nobody's business either. The seeds are fixed, because the rows are made up;
# for private data take `dp_rmt.batch_selection.fresh_seed()`.


# %%
def train_and_attack(dpsgd):
    clipped_grad = jax.jit(dpsgd.clipped_grad(losses))
    sampling = dpsgd.sampling(2)
    noise, optimizer = dpsgd.noise(noise_key(3)), optax.sgd(1.0)
    params = first_params()
    states = noise.init(params), optimizer.init(params)

    @jax.jit
    def score(params, released):
        _, per_example = clipped_grad(params, rows, is_padding_example=None)
        return canaries.gradient_scores(
            losses, params, rows, released, per_example.grad_norm, l2_clip_norm=dpsgd.l2_clip_norm
        )

    white_box = np.zeros(NUM_ROWS)
    for step in range(NUM_STEPS):
        indices = sampling.indices(step)
        batch = {name: values[indices] for name, values in rows.items()}
        gradient, _ = clipped_grad(params, batch, is_padding_example=(indices < 0) | ~is_member[indices])
        released, noise_state = noise.update(gradient, states[0])
        white_box += np.asarray(score(params, released))
        updates, optimizer_state = optimizer.update(released, states[1])
        params, states = optax.apply_updates(params, updates), (noise_state, optimizer_state)
    return {"white box": white_box, "black box": np.asarray(losses(first_params(), rows) - losses(params, rows))}


NUMBERS = {"num_examples": NUM_ROWS, "expected_batch_size": 250, "num_steps": NUM_STEPS, "l2_clip_norm": 1.0}
mechanisms = {
    "no privacy": dp_rmt.DPSGD(noise_multiplier=0.0, **NUMBERS),
    "epsilon 8": dp_rmt.DPSGD.calibrated(epsilon=8.0, delta=DELTA, **NUMBERS),
    "epsilon 1": dp_rmt.DPSGD.calibrated(epsilon=1.0, delta=DELTA, **NUMBERS),
}
scores = {name: train_and_attack(dpsgd) for name, dpsgd in mechanisms.items()}

# %% [markdown]
# ## Can somebody find out that a row was there?
#
# The area under the curve (AUC) is the probability that a member has a higher score than a row that was left out: 50%
# is guessing, and 100% is certainty. Then comes how many members are found at 10% false alarms, and the most that the
# guarantee allows any attack to find at that rate. Both are measured on 500 rows, so they have intervals: a rate that
# lies a little above what is allowed refutes nothing as long as its interval reaches below.

# %%
print(f"{'':10}  attack     AUC                       found at 10% false alarms  allowed")
for name, found in scores.items():
    allowed = mechanisms[name].largest_true_positive_rate(NUM_STEPS, 0.1)
    for attack, values in found.items():
        area = membership.auc(values[is_member], values[~is_member])
        rate = membership.tpr_at_fpr(values[is_member], values[~is_member], 0.1).true_positive_rate
        print(
            f"{name:10}  {attack}  {area.value:6.1%} ({area.low:6.1%} to {area.high:6.1%})"
            f"  {rate.value:6.1%} ({rate.low:6.1%} to {rate.high:6.1%})  {allowed:6.1%}"
        )

# %% [markdown]
# Without privacy the attacker who sees gradients knows nearly every member, and the loss alone betrays most of them.
# At epsilon 8 much can still be found, in rows that are all canaries, and at epsilon 1 little. The picture shows the
# whole trade: false alarms to the right, members found upwards. The dotted lines are what epsilon and delta allow.

# %%
figure, axes = plt.subplots(figsize=(6, 4.2))
rates = [0.001, 0.01, 0.03, 0.1, 0.2, 0.4, 0.7]
for color, (name, found) in zip(("C3", "C1", "C0"), scores.items(), strict=True):
    values = found["white box"]
    says_in = values[None, :] >= np.sort(values)[::-1][:, None]
    axes.plot(says_in[:, ~is_member].mean(1), says_in[:, is_member].mean(1), color=color, label=name)
    if mechanisms[name].noise_multiplier > 0:
        allowed = [mechanisms[name].largest_true_positive_rate(NUM_STEPS, rate) for rate in rates]
        axes.plot([0, *rates, 1], [0, *allowed, 1], ":", color=color)
axes.set(xlabel="false alarms", ylabel="members found", xlim=(0, 1), ylim=(0, 1.02))
axes.legend()
axes.grid(visible=True, alpha=0.3)
plt.show()

# %% [markdown]
# ## Is the code as private as it says?
#
# From the share of right guesses follows a lower bound on epsilon, from one run ([Steinke et al.
# 2023](https://arxiv.org/abs/2305.08846)). The attacker guesses the 50 highest scores to be in and the 50 lowest to
# be out. A bound above the epsilon that was promised would refute the promise, or rather the code.

# %%
for name, found in scores.items():
    guesses = canaries.guess_by_rank(found["white box"], num_in=50, num_out=50)
    guessed, right = canaries.correct_guesses(guesses, is_member)
    bound = lower_bounds.one_run_epsilon(NUM_ROWS, guessed, right, delta=DELTA)
    promised = mechanisms[name].epsilon(NUM_STEPS, DELTA)
    print(
        f"{name:10}: {right} of {guessed} guesses are right, epsilon is at least {bound:.2f}; promised {promised:.2f}"
    )

# %% [markdown]
# One run with some hundred rows shows a part of epsilon only: a bound far below the promise is no proof of slack.
#
# ## Audit the folder of a run
#
# A run of the program knows its own noise, sampling and number of updates. This command attacks thousands of small
# runs with the same numbers and one worst-case row in or out. It writes what it finds into the run's `privacy.md`:
#
#     dp-rmt audit --workdir=runs/reviews --runs=2000
#
# The code itself is audited with mistakes planted in it, and each must be found: [what came
# out](../project/experiments.md). What a *decoder* knows by heart is measured by `dp_rmt.auditing.exposure` and
# `dp_rmt.auditing.memorisation`.
