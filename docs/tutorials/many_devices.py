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
# # Many devices
#
# More devices make a step quicker, or make room for a larger model. They must not change what is promised. This page
# runs on eight virtual devices of one CPU, so that you can try it anywhere; on a machine with eight GPUs leave the
# line with `XLA_FLAGS` out. It shows three things: eight devices give the result of one, a model can be divided, and
# a run that dies on eight devices goes on with two.

# %%
import json
import os
from pathlib import Path

from dp_rmt import environment

environment.prepare()  # settings of XLA, before JAX is imported
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"

import flax.linen as nn
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import PartitionSpec

import dp_rmt
from dp_rmt.noise_addition import noise_key
from dp_rmt.training import Seeds, Task, Transforms, prepare_run
from dp_rmt.training.partitioning import make_mesh
from dp_rmt.trees import leaves_by_path

print(jax.device_count(), "devices")

# %% [markdown]
# ## A task
#
# Rows, a loss for each row, and first parameters: this is all that `prepare_run` wants to know.

# %%
NUM_EXAMPLES, NUM_STEPS, DELTA = 2000, 4, 1e-4
rng = np.random.default_rng(0)
x = rng.normal(size=(NUM_EXAMPLES, 32)).astype(np.float32)
labels = (x @ rng.normal(size=(32, 4))).argmax(axis=1).astype(np.int32)
model = nn.Sequential([nn.Dense(256), nn.relu, nn.Dense(4)])
task = Task(
    {"x": x, "label": labels},
    lambda params, batch: optax.softmax_cross_entropy_with_integer_labels(
        model.apply({"params": params}, batch["x"]), batch["label"]
    ),
    model.init(jax.random.key(0), x[:1])["params"],
    evaluators={
        "train": lambda params: {"accuracy": float((model.apply({"params": params}, x).argmax(1) == labels).mean())}
    },
)
dpsgd = dp_rmt.DPSGD.calibrated(
    epsilon=1.0,
    delta=DELTA,
    num_examples=NUM_EXAMPLES,
    expected_batch_size=200,
    num_steps=NUM_STEPS,
    l2_clip_norm=1.0,
    batch_multiple_of=8,  # a batch is cut into eight equal parts
)


def transforms(mechanism, noise_seed, mesh):
    return Transforms(mechanism.noise(noise_key(noise_seed)), mechanism.denoiser(), optax.adam(0.02))


def run_on(mesh, **options):
    # The seeds are given, so that runs can be compared. The data is made up; with private data leave them out.
    return prepare_run(task, dpsgd, transforms, delta=DELTA, mesh=mesh, seeds=Seeds(sampling=1, noise=2), **options)


# %% [markdown]
# ## Eight devices give the result of one
#
# By default all devices divide the examples of each batch, and each has a copy of the parameters. The noise is drawn
# once, from the same key, whatever the number of devices: it would be a mistake for each device to add its own.

# %%
one = run_on(make_mesh(devices=jax.devices()[:1]))
eight = run_on(make_mesh(data=8))
params_of_one = one.published_params(one.train("runs/one"))
params_of_eight = eight.published_params(eight.train("runs/eight"))


# %%
def largest_difference(one, other):
    return max(
        float(abs(np.asarray(a) - np.asarray(b)).max())
        for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)
    )


largest = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(params_of_one))
print(f"largest parameter {largest:.2f}, largest difference {largest_difference(params_of_one, params_of_eight):.1e}")
for name in ("one", "eight"):
    statement = json.loads(Path("runs", name, "privacy.json").read_text(encoding="utf-8"))
    print(f"runs/{name}: epsilon {statement['epsilon']}, delta {statement['delta']}")

# %% [markdown]
# The difference is rounding: eight partial sums are added in another order. The guarantee is the same to the last
# digit.
#
# ## A model that is too large for one device
#
# `fsdp` divides parameters, gradients and the optimizer's moments over the devices. Rules say how: a regular
# expression over the path of a parameter, and the axis of the mesh for each axis of the array. The models of this
# library have theirs.

# %%
RULES = (
    ("kernel$", PartitionSpec(None, "fsdp")),  # each device has some of the outputs
    ("bias$", PartitionSpec()),  # a copy on every device
)
divided = run_on(make_mesh(data=2, fsdp=4), rules=RULES)


def bytes_by_device(state):
    total = dict.fromkeys(range(8), 0)
    for leaf in jax.tree.leaves((state.params, state.optimizer)):
        if isinstance(leaf, jax.Array):
            for shard in leaf.addressable_shards:
                total[shard.device.id] += shard.data.nbytes
    return total


for path, leaf in leaves_by_path(divided.state.params):
    print(f"{path:18} {leaf.shape!s:10} on each device {leaf.addressable_shards[0].data.shape}")
figure, axes = plt.subplots(figsize=(6, 3))
for name, run in (("copies", run_on(make_mesh(data=8))), ("fsdp=4", divided)):
    axes.bar([str(device) for device in range(8)], [n / 1000 for n in bytes_by_device(run.state).values()], label=name)
axes.set(xlabel="device", ylabel="kB of parameters and moments")
axes.legend()
plt.show()

# %% [markdown]
# ## A run that dies on eight devices goes on with two
#
# Checkpoints do not depend on the devices. Here the run is stopped after 2 of 4 updates on the divided mesh, and
# goes on with two devices. Samples and noise of the last two updates are those of the run that nobody interrupted.

# %%
divided.train("runs/moved", until=2)
two = run_on(make_mesh(devices=jax.devices()[:2]))
params_after_move = two.published_params(two.train("runs/moved"))

# %%
print(f"largest difference from the run on one device {largest_difference(params_of_one, params_after_move):.1e}")

# %% [markdown]
# ## With the program
#
# All devices divide the examples unless you say otherwise, and the settings have the names of the mesh:
#
#     dp-rmt finetune --model=gpt2 --train=letters.jsonl --epsilon=8 --workdir=runs/letters \
#       --config.mesh.data=2 --config.mesh.fsdp=4
#
# [Launching](../launch.md) explains nodes with GPUs, Slurm and TPU pods, and [Scaling](../scaling.md) counts what
# each way to divide costs.
