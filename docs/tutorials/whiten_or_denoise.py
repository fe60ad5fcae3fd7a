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
# # Should I whiten, should I denoise?
#
# Three things can limit a private run. Its steps may be too long for the steepest direction of the loss. Its noise
# may hide a signal that a denoiser can find. Or there may be no more signal than noise, and only more data helps. The
# noisy gradients themselves show which it is, so that looking costs no privacy. This page makes one problem of each
# kind, asks the advisor, does what it says, and looks at what that gains.
#
# In the program the advisor is always on (`config.train.advice`): every run ends with its sentence.

# %%
from dp_rmt import environment

environment.prepare()  # settings of XLA, before JAX is imported

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import dp_rmt
from dp_rmt.geometry import layer_moments, top_shares, whiten_inputs, whitened_coordinates
from dp_rmt.noise_addition import noise_key
from dp_rmt.reporting.advice import advice
from dp_rmt.training.advice import advice_metrics, measure_steps

# %% [markdown]
# ## The problems
#
# One layer learns a matrix of rank two, from inputs to outputs, at epsilon 3. The problems differ in the number of
# rows, and in whether the inputs have a mean. The inputs of real layers have one, and often it is most of what they
# are. The data is made up, so that this page may print losses and fix the seeds; with private data both are as secret
# as the data.

# %%
INPUTS, OUTPUTS, NUM_STEPS = 256, 192, 30
model = nn.Dense(OUTPUTS)
rng = np.random.default_rng(0)
teacher = rng.normal(size=(INPUTS, 2)) @ rng.normal(size=(2, OUTPUTS)) / INPUTS**0.5


def losses(params, batch):
    return 0.5 * jnp.sum((model.apply(params, batch["x"]) - batch["y"]) ** 2, axis=-1)


def problem(num_examples, mean):
    z = rng.normal(size=(num_examples, INPUTS))
    return {"x": (z + mean).astype(np.float32), "y": (z @ teacher).astype(np.float32)}


# %% [markdown]
# ## The loop
#
# `measure_steps` goes around the optimizer and leaves its updates as they are. It needs the noisy gradient as it was
# before any denoising. With `coordinates` the gradient is clipped, noised and given to Adam in whitened coordinates,
# and `whiten_inputs` takes the update back.


# %%
def make_step(dpsgd, denoise, coordinates):
    clipped_grad = dpsgd.clipped_grad(losses, coordinates=coordinates)
    stages = {
        "noise": dpsgd.noise(noise_key(1)),
        "denoise": dpsgd.denoiser() if denoise else optax.identity(),
        "optimizer": measure_steps(optax.chain(optax.scale_by_adam(), optax.scale(-1.0)), dpsgd.noise_std),
        "back": optax.identity() if coordinates is None else whiten_inputs(coordinates),
    }

    @jax.jit
    def step(params, states, batch, is_padding, learning_rate):
        gradient, _ = clipped_grad(params, batch, is_padding_example=is_padding)
        noisy, noise = stages["noise"].update(gradient, states["noise"])
        denoised, denoise = stages["denoise"].update(noisy, states["denoise"])
        update, optimizer = stages["optimizer"].update(denoised, states["optimizer"], params, noisy=noisy)
        metrics = advice_metrics(optimizer)
        update, back = stages["back"].update(update, states["back"], params)
        params = jax.tree.map(lambda p, u: p + learning_rate * u, params, update)
        return params, {"noise": noise, "denoise": denoise, "optimizer": optimizer, "back": back}, metrics

    return step, lambda params: {name: stage.init(params) for name, stage in stages.items()}


def first_params():
    return jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0), jnp.zeros((1, INPUTS))))


@functools.cache
def mechanism(num_examples):
    return dp_rmt.DPSGD.calibrated(
        epsilon=3.0,
        delta=1e-5,
        num_examples=num_examples,
        expected_batch_size=num_examples // 10,
        num_steps=NUM_STEPS,
        l2_clip_norm=1.0,
    )


def train(data, learning_rates, *, denoise=False, coordinates=None, shares=None):
    """Trains at each rate; returns {rate: (loss after every step, advice)}."""
    dpsgd = mechanism(len(data["x"]))
    step, init = make_step(dpsgd, denoise, coordinates)
    found = {}
    for rate in learning_rates:
        params, sampling = first_params(), dpsgd.sampling(2)
        states, curve, lines = init(params), [], []
        for number in range(NUM_STEPS):
            indices = sampling.indices(number)
            batch = {name: values[indices] for name, values in data.items()}
            params, states, metrics = step(params, states, batch, indices < 0, rate)
            lines.append({"step": number + 1, **{name: float(value) for name, value in metrics.items()}})
            curve.append(float(losses(params, data).mean()))
        found[rate] = curve, advice(lines[1:], shares)  # there is nothing behind the first step yet
    return found


def draw(axes, found, name, style):
    rate = min(found, key=lambda rate: found[rate][0][-1])
    axes.semilogy(range(1, NUM_STEPS + 1), found[rate][0], style, label=f"{name}, rate {rate}")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    axes.grid(visible=True, alpha=0.3)
    return rate


RATES = (0.001, 0.003, 0.01)

# %% [markdown]
# ## Steps that overshoot
#
# The first problem has inputs with a large mean. Before any training the second moments of the inputs show it, and
# these are public if the rows that they are taken from are: here other rows of the same kind, in the program random
# tokens.

# %%
data = problem(8000, mean=2.0)
moments = layer_moments(losses, first_params(), [problem(1000, mean=2.0)])
shares = top_shares(moments)
print({path: f"{share:.0%} of the inputs lie in one direction" for path, share in shares.items()})
plain = train(data, RATES, shares=shares)
print("advice:", plain[0.01][1].sentence)

# %% [markdown]
# A step overshoots if the loss rises behind it. In one direction most of the inputs lie, the loss is steep there, and
# a rate that the others need is too high for it. So we whiten: in the coordinates in which the inputs are even there
# is no such direction. Each arm is drawn at the best of its rates.

# %%
whitened = train(data, RATES, coordinates=whitened_coordinates(moments))
figure, axes = plt.subplots(figsize=(6, 3.5))
rate = draw(axes, plain, "plain", "o-")
best = draw(axes, whitened, "whitened", "s-")
plt.show()
print(f"loss {plain[rate][0][-1]:.1f} without and {whitened[best][0][-1]:.1f} with whitening")

# %% [markdown]
# ## Signals above the noise
#
# The second problem has as many rows, and inputs without a mean. No step overshoots now. The advisor compares the
# largest singular value of the noisy gradient, y₁, with the edge e, up to which noise alone reaches.

# %%
data = problem(8000, mean=0.0)
plain = train(data, RATES)
print("advice:", plain[0.003][1].sentence)

# %% [markdown]
# The true gradient has rank two and stands above the edge, and noise fills all of the 192 directions. The denoiser
# keeps what stands above, and shrinks it by as much as noise has stretched it.

# %%
denoised = train(data, RATES, denoise=True)
figure, axes = plt.subplots(figsize=(6, 3.5))
rate = draw(axes, plain, "plain", "o-")
best = draw(axes, denoised, "denoised", "s-")
plt.show()
print(f"loss {plain[rate][0][-1]:.1f} without and {denoised[best][0][-1]:.1f} with denoising")

# %% [markdown]
# ## Neither
#
# The third problem has 600 rows. At the same epsilon the noise in the mean gradient is more than ten times as large,
# and the signal lies below the edge. No method of this page helps here, and the advisor does not promise one.

# %%
few = train(problem(600, mean=0.0), (0.001,))
print("advice:", few[0.001][1].sentence)

# %% [markdown]
# ## In the program
#
# Every run ends with the sentence that fits it. What it names is a setting:
#
#     dp-rmt finetune --model=roberta-base --train=reviews.csv --epsilon=3 --workdir=runs/reviews \
#       --config.whitening.where=before_clipping --config.denoise="()"
#
# The advice says what limits a run, and not how much a method gains. That depends on the task: [what was
# measured](../project/experiments.md) on real models, where denoising at times gains nothing. Tune the learning rate
# first, because a rate that is off by a factor of two costs more than any of this.
