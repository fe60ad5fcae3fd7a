"""The gradients of a run on PUBLIC data, step by step: clean, noisy, and after the denoiser.

The clean gradient is a raw private value. On private data everything computed from it would break the guarantee. A
config that switches nonprivate metrics off is therefore refused, and names of values computed from the clean gradient
begin with ``nonprivate/``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from dp_rmt.finetuning import assemble
from dp_rmt.finetuning.checks import arm_settings
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.workdir import as_json
from dp_rmt.reporting import machine
from dp_rmt.training.run import Run
from dp_rmt.training.train_state import Transforms
from dp_rmt.types import Params


class Gradients(NamedTuple):
    """One update of a run.

    Attributes:
      step: the number of this update, from 1.
      clean: sum of clipped gradients over the expected batch size.
      noisy: the same with noise.
      denoised: the gradient that the optimizer got.
      metrics: metrics of the training step.
      params: all parameters after the update, trained and frozen.
    """

    step: int
    clean: Params
    noisy: Params
    denoised: Params
    metrics: dict[str, Any]
    params: Params


@dataclasses.dataclass(frozen=True)
class GradientStream:
    """An ordinary run whose gradients can be looked at.

    Attributes:
      arm: name of the arm that is run.
      name: config, arm, batch size, epsilon and seed in one word, for the record's file.
      settings: settings of the arm, with its seeds.
      run: the run, with snapshots between the stages of a step.
      num_steps: number of its steps to take.
    """

    arm: str
    name: str
    settings: Settings
    run: Run
    num_steps: int

    @classmethod
    def build(cls, experiment: Settings, *, arm: str, seed: int, num_steps: int) -> GradientStream:
        """Loads data and model and prepares the run.

        Args:
          experiment: settings of the experiment.
          arm: name of the arm to run, which decides the trajectory.
          seed: seed of sampling and noise, which may be known because the data is public.
          num_steps: number of steps to take, at most those of the schedule.

        Returns:
          A `GradientStream`.

        Raises:
          ValueError, FileNotFoundError: the message says what is wrong and what to do.
        """
        arms = arm_settings(experiment)
        if arm not in arms:
            raise ValueError(f"--arm={arm}: there is no such arm; choose from {', '.join(arms)}")
        seeds = dict.fromkeys(("privacy.sampling_seed", "privacy.noise_seed"), seed)
        settings = arms[arm].changed(seeds)
        if not settings.privacy.nonprivate_metrics:
            raise ValueError(
                "config.privacy.nonprivate_metrics=False, but this looks at the clean gradient, which is as private as "
                "the data; on public data leave the key at True"
            )
        if math.isinf(settings.privacy.epsilon):
            raise ValueError("config.privacy.epsilon=inf: without noise the gradients are all the same; give a number")
        task = assemble.load_task(settings)
        run = assemble.build_run(settings, task, name=arm, observe=with_snapshots)
        if num_steps > (scheduled := run.loop.mechanism.num_steps):
            raise ValueError(f"{num_steps} steps are asked for, but the run has {scheduled} (config.train.num_steps)")
        batch_size, epsilon = settings.privacy.expected_batch_size, settings.privacy.epsilon
        return cls(arm, f"{experiment.name}_{arm}_b{batch_size}_eps{epsilon:g}_seed{seed}", settings, run, num_steps)

    def steps(self) -> Iterator[Gradients]:
        """Trains, and yields each update; its arrays belong to the run and are gone once the next one is asked for."""
        loop, state = self.run.loop, self.run.state
        sampling = loop.mechanism.sampling(self.run.sampling_seed)
        for step in range(self.num_steps):
            state, metrics = loop.train_step(state, loop.groups(sampling.indices(step)))
            clean, noisy, denoised = (
                optax.tree.get((state.noise, state.denoise), name) for name in ("clean", "noisy", "denoised")
            )
            yield Gradients(step + 1, clean, noisy, denoised, jax.device_get(metrics), self.run.published_params(state))

    def description(self) -> dict[str, Any]:
        """The description of the run for a record, without folders of this machine."""
        mechanism = self.run.loop.mechanism
        config = as_json(self.settings)
        config["data"] |= {"path": Path(self.settings.data.path or "").name, "cache_dir": None}
        return {
            "arm": self.arm,
            "config": config,
            "delta": self.run.delta,
            "noise_multiplier": mechanism.noise_multiplier,
            "noise_std": mechanism.noise_std,
            "batch_size": mechanism.expected_batch_size,
            "steps_of_the_schedule": mechanism.num_steps,
            "machine": machine.description(),
        }


def with_snapshots(transforms: Transforms) -> Transforms:
    """The same stages; their states hold the last "clean", "noisy" and "denoised" gradient."""

    def snapshot(name: str) -> optax.GradientTransformation:
        return optax.snapshot(name, lambda updates: updates)

    return dataclasses.replace(
        transforms,
        noise=optax.chain(snapshot("clean"), transforms.noise, snapshot("noisy")),
        denoise=optax.chain(transforms.denoise, snapshot("denoised")),
    )
