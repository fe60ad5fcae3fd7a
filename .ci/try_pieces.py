"""What a stranger does first with an installed dp_rmt and its core dependencies alone: run outside any checkout.

    python try_pieces.py

Ends with an error unless `import dp_rmt` is light, the pieces learn a tiny problem, the accountant answers, and what
needs more packages says which command installs them.
"""

import os
import sys
import time

start, before = time.perf_counter(), dict(os.environ)
import dp_rmt  # noqa: E402

seconds = time.perf_counter() - start
assert "jax" not in sys.modules
assert seconds < 0.3, f"import dp_rmt took {seconds:.2f} s"
assert "site-packages" in dp_rmt.__file__, f"{dp_rmt.__file__} is not the installed package"
dp_rmt.environment.prepare()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

x = np.random.default_rng(0).normal(size=(2000, 32))
y = x @ np.ones((32, 16))
dpsgd = dp_rmt.DPSGD.calibrated(
    epsilon=3.0, delta=1e-5, num_examples=2000, expected_batch_size=256, num_steps=50, l2_clip_norm=1.0
)
noise_key = dp_rmt.noise_addition.noise_key(0)
optimizer = optax.chain(dpsgd.noise(noise_key), dpsgd.denoiser(), optax.adam(0.05))
params = {"kernel": jnp.zeros((32, 16))}
state = optimizer.init(params)
clipped_grad = jax.jit(
    dpsgd.clipped_grad(lambda params, batch: jnp.sum((batch["x"] @ params["kernel"] - batch["y"]) ** 2, axis=-1))
)
sampler = dpsgd.sampling(0)
for step in range(dpsgd.num_steps):
    indices = sampler.indices(step)
    gradient, _ = clipped_grad(params, {"x": x[indices], "y": y[indices]}, is_padding_example=indices < 0)
    updates, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
assert abs(float(params["kernel"].mean()) - 1.0) < 0.3
assert 2.9 < dpsgd.epsilon(dpsgd.num_steps, delta=1e-5) <= 3.0
print(f"dp_rmt {dp_rmt.__version__}: imported in {seconds:.3f} s; the pieces learn")

for room in ("dp_rmt.finetuning.settings", "dp_rmt.models", "dp_rmt.training.train", "dp_rmt.reporting.plots"):
    said = ""
    try:
        __import__(room)
    except ModuleNotFoundError as error:
        said = str(error)
    assert "pip install 'dp_rmt[" in said, f"{room} does not say which extra it needs, but {said!r}"
    print(f"{room}: {said}")
