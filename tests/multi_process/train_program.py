"""A small private training run, as a program that tests start, several times at once, and kill.

``python train_program.py '{"folder": ..., ...}'``; the keys are the arguments of `main`. It resumes from what is in the
folder, and leaves ``final.npz`` there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from dp_rmt.clipping.execution import Execution
from dp_rmt.data import fingerprint
from dp_rmt.mechanism import DPSGD
from dp_rmt.noise_addition import noise_key
from dp_rmt.reporting.privacy_statement import PrivacyStatement
from dp_rmt.reporting.provenance import Provenance
from dp_rmt.training import processes, train
from dp_rmt.training.checkpoint import Checkpoints
from dp_rmt.training.evaluation import make_evaluator
from dp_rmt.training.ledger import Entry, now
from dp_rmt.training.losses import label_losses
from dp_rmt.training.metrics import MetricsWriter
from dp_rmt.training.partitioning import init_state, jit_train_step, make_mesh
from dp_rmt.training.releases import Releases
from dp_rmt.training.train import TrainLoop
from dp_rmt.training.train_state import Transforms
from dp_rmt.training.train_step import make_train_step
from dp_rmt.trees import leaves_by_path, split_params

NUM_EXAMPLES, LENGTH, WORDS, WIDTH, NUM_STEPS = 40, 6, 10, 12, 12
DELTA = 1e-3
MECHANISM = DPSGD(
    num_examples=NUM_EXAMPLES,
    expected_batch_size=8.0,
    num_steps=NUM_STEPS,
    noise_multiplier=0.7,
    l2_clip_norm=0.5,
    max_batch_size=20,
    batch_multiple_of=4,
    accountant="rdp",
)
RULES = [
    ("embedding", PartitionSpec("fsdp", None)),
    ("hidden/kernel", PartitionSpec("fsdp", "tensor")),
    ("out/|ballast", PartitionSpec()),
]


class Recorded(np.ndarray):
    """Remembers which rows were gathered from it, and from what was cut from it."""

    rows: ClassVar[set[int]] = set()

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, np.ndarray) and index.dtype.kind == "i":
            Recorded.rows |= {int(row) for row in index if row >= 0}
        return super().__getitem__(index)


def make_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, LENGTH + 1, NUM_EXAMPLES)
    mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
    ids = rng.integers(1, WORDS, (NUM_EXAMPLES, LENGTH)).astype(np.int32) * mask
    return {"input_ids": ids, "attention_mask": mask, "label": (ids.sum(axis=1) % 2).astype(np.int32)}


def logits(params, batch):
    hidden = jnp.sum(params["embedding"][batch["input_ids"]] * batch["attention_mask"][..., None], axis=1)
    return jnp.tanh(hidden @ params["hidden"]["kernel"]) @ params["out"]["kernel"] + params["out"]["bias"]


def build(ballast: int, divided: str) -> tuple[TrainLoop, Any]:
    arrays, mesh = make_arrays(), make_mesh(**{"data": 1, divided: -1})
    schedule = optax.linear_schedule(0.1, 0.0, NUM_STEPS)
    transforms = Transforms(
        MECHANISM.noise(noise_key(11)), MECHANISM.denoiser(svd="gram"), optax.adamw(schedule, eps=1e-3)
    )
    rng = np.random.default_rng(1)
    initial = {
        "embedding": rng.standard_normal((WORDS, WIDTH), np.float32) / 3,
        "hidden": {"kernel": rng.standard_normal((WIDTH, 16), np.float32) / 3},
        "out": {"kernel": rng.standard_normal((16, 2), np.float32) / 3, "bias": np.zeros(2, np.float32)},
    }
    if ballast:
        initial["ballast"] = rng.standard_normal(ballast, np.float32)
    params, frozen = split_params(initial, "hidden|out")
    state, shardings = init_state(transforms, params, frozen, mesh, RULES)

    def losses(params, batch):
        return label_losses(logits(params, batch), batch["label"])

    step = make_train_step(MECHANISM, losses, transforms, execution=Execution("vmap", 4), layout=shardings.params)
    recorded = arrays | {"input_ids": arrays["input_ids"].view(Recorded)}
    loop = TrainLoop(
        train_step=jit_train_step(step, mesh, shardings),
        mechanism=MECHANISM,
        delta=DELTA,
        arrays=recorded,
        lengths=(3, LENGTH),
        evaluators={"dev": make_evaluator(logits, arrays, metrics=("accuracy",), lengths=(LENGTH,), batch_size=16)},
        learning_rate=schedule,
        eval_every=4,
        checkpoint_every=2,
        published_params=transforms.published_params,
        microbatch_size=4,
        mesh=mesh,
    )
    return loop, state


def announced(folder: str, run: str, steps_done: int) -> Releases:
    """Ledger and statement of this program's mechanism."""

    def statement(updates: int) -> PrivacyStatement:
        epsilon = MECHANISM.epsilon(updates, DELTA)
        return PrivacyStatement(
            epsilon=epsilon,
            target_epsilon=None,
            delta=DELTA,
            epsilon_pld=None,
            epsilon_rdp=epsilon,
            clip="flat",
            num_steps=updates,
            l2_clip_norm=0.5,
            expected_batch_size=8.0,
            noise_std=MECHANISM.noise_std,
            nonprivate_metrics=True,
            **shared,
        )

    shared: dict[str, Any] = {
        "noise_multiplier": 0.7,
        "sampling_probability": MECHANISM.sampling_probability,
        "max_batch_size": 20,
        "num_examples": NUM_EXAMPLES,
        "seeds_from": "given in the config",
    }
    entry = Entry(
        run=run,
        updates=steps_done,
        is_exact=True,
        l2_clip_norm=0.5,
        num_steps=NUM_STEPS,
        delta=DELTA,
        date=now(),
        train_data=fingerprint(make_arrays()),
        about=Provenance(task="sums"),
        **shared,
    )
    return Releases(folder, entry, statement)


def main(
    folder: str,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat: int = 10,
    until: int | None = None,
    seconds_per_step: float = 0.0,
    signal_at: int | None = None,
    signal_name: str = "SIGKILL",
    ballast: int = 0,
    divided: str = "fsdp",
    epsilon_points: int = 1,
) -> None:
    """Trains; `signal_at` sends the process a signal before a step, `ballast` makes the state so many floats larger,
    `divided` is the axis of the mesh that the devices are on."""
    processes.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=heartbeat)
    train.EPSILON_POINTS = epsilon_points
    with processes.ending_together():
        loop, state = build(ballast, divided)
        counted = iter(range(int(1e9)))
        compiled = loop.train_step

        def step(state, groups):
            if next(counted) == signal_at:
                os.kill(os.getpid(), getattr(signal, signal_name))
            time.sleep(seconds_per_step)
            return compiled(state, groups)

        loop = dataclasses.replace(loop, train_step=step)
        checkpoints = Checkpoints(Path(folder) / "checkpoints", {"train_data": fingerprint(make_arrays())})
        seed = 2**90 + 3
        restored = checkpoints.restore(state)
        if restored is not None:
            state, seed = restored
        metrics = MetricsWriter(Path(folder) / "metrics.jsonl") if processes.is_first() else None
        releases = announced(folder, checkpoints.run, int(state.step)) if processes.is_first() else None
        loop.groups(MECHANISM.sampling(seed).indices(0))
        (Path(folder) / f"rows{jax.process_index()}.json").write_text(json.dumps(sorted(Recorded.rows)))
        print(f"training from step {int(state.step)}", flush=True)
        state = loop.run(state, MECHANISM.sampling(seed), checkpoints, metrics, releases, until=until)
        checkpoints.close()
        final = processes.to_host((state.params, state.optimizer))
        if processes.is_first():
            np.savez(Path(folder) / "final.npz", **{path: np.asarray(leaf) for path, leaf in leaves_by_path(final)})


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
