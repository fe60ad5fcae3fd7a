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
# # Choosing epsilon, delta, batch and steps
#
# Four numbers decide how much noise a run has. This page draws what each of them does. Nothing here looks at data, so
# you can choose before you touch any.

# %%
import functools

import matplotlib.pyplot as plt

import dp_rmt
from dp_rmt.accounting import epsilon_curve

NUM_EXAMPLES = 67_349  # SST-2; put in your own
DELTA = NUM_EXAMPLES**-1.1


@functools.cache
def mechanism(epsilon=3.0, batch=1000, steps=200):
    return dp_rmt.DPSGD.calibrated(
        epsilon=epsilon,
        delta=DELTA,
        num_examples=NUM_EXAMPLES,
        expected_batch_size=batch,
        num_steps=steps,
        l2_clip_norm=1.0,
    )


# %% [markdown]
# ## Delta
#
# Delta is the probability that the guarantee fails, so it is fixed first, well below one over the number of examples.
# The program takes $N^{-1.1}$. It costs little: a delta a hundred times as small needs a few percent more noise.

# %% [markdown]
# ## Noise against batch
#
# The noise in one entry of the gradient is `noise_multiplier * C / B`. Four times the batch needs more noise in the
# sum, but much less than four times: the noise in the mean falls until the noise multiplier grows in proportion.

# %%
batches = [250, 1000, 4000, 16000]
stds = [mechanism(batch=batch).noise_std for batch in batches]
figure, axes = plt.subplots(figsize=(6, 3.5))
axes.loglog(batches, stds, "o-")
axes.set(xlabel="expected batch size", ylabel="noise in one entry, over the clip norm", title="epsilon 3, 200 steps")
axes.grid(visible=True, alpha=0.3)
plt.show()
print({batch: round(std, 6) for batch, std in zip(batches, stds, strict=True)})

# %% [markdown]
# So take the largest batch that your time allows. Memory does not limit it: microbatches are summed before the noise.
#
# ## Epsilon against steps
#
# At a fixed noise multiplier epsilon grows with the number of steps, first quickly and then about as its square root.

# %%
chosen = mechanism()
steps = [1, 5, 10, 25, 50, 100, 200, 400, 800]
curve = epsilon_curve(
    noise_multiplier=chosen.noise_multiplier,
    delta=DELTA,
    sampling_probability=chosen.sampling_probability,
    steps=steps,
)
figure, axes = plt.subplots(figsize=(6, 3.5))
axes.plot(steps, curve, "o-")
axes.axvline(200, color="gray", linestyle=":")
axes.set(xlabel="steps", ylabel="epsilon", title=f"noise multiplier {chosen.noise_multiplier:.3f}, batch 1,000")
axes.grid(visible=True, alpha=0.3)
plt.show()

# %% [markdown]
# ## Steps or batch?
#
# For the same number of examples looked at, few large steps have less noise each than many small ones. Fewer than 50
# steps leave an optimizer too little time. Between 100 and 1,000 is usual.

# %%
for batch, count in ((1000, 200), (4000, 50)):
    found = mechanism(batch=batch, steps=count)
    print(f"batch {batch:5}, {count:4} steps: noise in one entry {found.noise_std:.6f}")

# %% [markdown]
# ## Epsilon
#
# Halving epsilon does not double the noise. What an attacker can find out at most is
# [a table in figures](../start/privacy_in_figures.md).

# %%
for epsilon in (1.0, 3.0, 8.0):
    found = mechanism(epsilon=epsilon)
    detected = found.largest_true_positive_rate(200, 0.01)
    print(
        f"epsilon {epsilon:3}: noise multiplier {found.noise_multiplier:.3f}, found at 1% false alarms: {detected:.1%}"
    )
