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
# # The pieces in a loop of your own
#
# Everything here is a function of JAX or a transformation of optax. The loop is yours, and the model is any function
# `per_example_losses(params, batch)` that returns one loss for each example.

# %%
from dp_rmt import environment

environment.prepare()  # settings of XLA, before JAX is imported

import jax
import numpy as np
import optax

import dp_rmt
from dp_rmt.batch_selection import fresh_seed
from dp_rmt.noise_addition import noise_key

NUM_EXAMPLES, NUM_STEPS = 4000, 60
rng = np.random.default_rng(0)
x = rng.normal(size=(NUM_EXAMPLES, 32)).astype(np.float32)
labels = (x @ rng.normal(size=(32, 4))).argmax(axis=1)

# %% [markdown]
# ## The mechanism
#
# One object has all the numbers of the guarantee, so that noise, denoiser and accountant cannot disagree.

# %%
dpsgd = dp_rmt.DPSGD.calibrated(
    epsilon=3.0,
    delta=1e-5,
    num_examples=NUM_EXAMPLES,
    expected_batch_size=400,
    num_steps=NUM_STEPS,
    l2_clip_norm=1.0,
)
print(f"noise multiplier {dpsgd.noise_multiplier:.3f}, noise in one entry {dpsgd.noise_std:.5f}")


# %% [markdown]
# ## The loop
#
# `train` is the same for every way to write the model. The order of the optimizer's chain is the one thing to get
# right: noise first, denoiser directly behind it, then anything.


# %%
def train(losses, params):
    clipped_grad = jax.jit(dpsgd.clipped_grad(losses))
    sampling = dpsgd.sampling(fresh_seed())
    optimizer = optax.chain(dpsgd.noise(noise_key(fresh_seed())), dpsgd.denoiser(), optax.adam(0.03))
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(NUM_STEPS):
        indices = sampling.indices(step)  # a Poisson sample; -1 is padding
        batch = {"x": x[indices], "label": labels[indices]}
        gradient, _ = clipped_grad(params, batch, is_padding_example=indices < 0)
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def cross_entropy(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])


def accuracy(network, params):
    return float((network(params, x).argmax(axis=1) == labels).mean())


# %% [markdown]
# ## Plain JAX


# %%
def network(params, inputs):
    return jax.nn.relu(inputs @ params["hidden"]["kernel"]) @ params["out"]["kernel"]


def plain_params(seed=0):
    keys = jax.random.split(jax.random.key(seed))
    return {
        "hidden": {"kernel": 0.2 * jax.random.normal(keys[0], (32, 64))},
        "out": {"kernel": 0.1 * jax.random.normal(keys[1], (64, 4))},
    }


params = train(lambda params, batch: cross_entropy(network(params, batch["x"]), batch), plain_params())
print(f"plain JAX: accuracy {accuracy(network, params):.1%}")

# %% [markdown]
# ## Flax linen
#
# Models of stock layers are clipped at about the cost of an ordinary gradient: `clipping_method="auto"`, the default
# of `Execution`, finds out that it fits.

# %%
import flax.linen as nn

model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(4)])
linen_params = model.init(jax.random.key(0), x[:1])
params = train(lambda params, batch: cross_entropy(model.apply(params, batch["x"]), batch), linen_params)
print(f"flax linen: accuracy {accuracy(model.apply, params):.1%}")

# %% [markdown]
# ## Flax nnx
#
# `nnx.split` takes a model apart into a graph and a pytree of parameters, and `nnx.merge` puts it together inside the
# loss. What is trained is the pytree.

# %%
from flax import nnx


class Network(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(32, 64, rngs=rngs)
        self.out = nnx.Linear(64, 4, rngs=rngs)

    def __call__(self, inputs):
        return self.out(jax.nn.relu(self.hidden(inputs)))


graph, state = nnx.split(Network(nnx.Rngs(0)))
nnx_params = nnx.to_pure_dict(state)


def nnx_network(params, inputs):
    return nnx.merge(graph, params)(inputs)


params = train(lambda params, batch: cross_entropy(nnx_network(params, batch["x"]), batch), nnx_params)
print(f"flax nnx: accuracy {accuracy(nnx_network, params):.1%}")

# %% [markdown]
# ## Equinox
#
# An Equinox model is a pytree itself. `eqx.partition` splits it into arrays, which are trained, and the rest, and
# `eqx.combine` inside the loss puts it together. An Equinox model takes one example, so `jax.vmap` runs it on a
# batch.

# %%
import equinox as eqx

keys = jax.random.split(jax.random.key(0))
model = eqx.nn.Sequential(
    [eqx.nn.Linear(32, 64, key=keys[0]), eqx.nn.Lambda(jax.nn.relu), eqx.nn.Linear(64, 4, key=keys[1])]
)
eqx_params, rest = eqx.partition(model, eqx.is_inexact_array)


def eqx_network(params, inputs):
    return jax.vmap(eqx.combine(params, rest))(inputs)


params = train(lambda params, batch: cross_entropy(eqx_network(params, batch["x"]), batch), eqx_params)
print(f"equinox: accuracy {accuracy(eqx_network, params):.1%}")

# %% [markdown]
# The four models have the same layers and the same budget. They end alike: how a model is written is a matter of
# taste, and the differences are those of the first values and of the noise.
#
# ## What was spent

# %%
print(f"each of the four models: epsilon {dpsgd.epsilon(NUM_STEPS, delta=1e-5):.3f}")

# %% [markdown]
# The four models together cost more than one, because all were trained on the same data. It is less than four times
# as much: what two runs reveal is partly the same. `epsilon_of_composition` adds up:

# %%
from dp_rmt.accounting import Step, epsilon_of_composition

step = Step(dpsgd.noise_multiplier, dpsgd.sampling_probability, dpsgd.truncation)
together = epsilon_of_composition({step: 4 * NUM_STEPS}, delta=1e-5)
print(f"all four together: epsilon {together:.3f}")
