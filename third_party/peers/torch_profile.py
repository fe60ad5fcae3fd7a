"""Opacus 1.6.0's ghost clipping (Meta, Apache 2.0) and the plain gradient, in torch, side by side.

    python -m third_party.peers.torch_profile '{"hf_config": {...}, "batch_size": 32, ...}'

The model is transformers' sequence classifier of the given config.json, with random weights and without dropout.
Opacus is set up as its tutorial does: `PrivacyEngine.make_private(grad_sample_mode="ghost")` with defaults, the whole
batch at once. A step is what lies between zeroed gradients and their sum; noise and optimizer are left out, as in the
plain step. bfloat16 is torch's autocast. Without Opacus the plain step is measured alone. Prints one line of JSON.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers

from experiments.benchmarks.rounds import alternate, median_ratio
from third_party.peers import OPACUS, NotInstalledError, require

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Of Opacus's sum against gradients one by one, relative to its norm; Opacus itself adds 1e-6 to every norm."""

Batch = Mapping[str, torch.Tensor]
Step = Callable[[Batch], None]
"""Leaves its result in the ``grad`` of the model's parameters."""


def main(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Measures both steps; see `experiments.benchmarks.step.torch_peers` for the settings and the result."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # One thread on each core that the process may use, as XLA has.
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    torch.manual_seed(0)
    model = make_model(settings).to(device).train()
    batch = make_batch(settings, device)
    autocast = functools.partial(torch.autocast, device, torch.bfloat16, enabled=settings["dtype"] == "bfloat16")
    models, steps = [model], {"plain": plain_step(model, autocast)}
    reason, error = None, None
    try:
        require(OPACUS)
    except NotInstalledError as missing:
        reason = str(missing)
    else:
        models.append(copy.deepcopy(model))
        steps["opacus_ghost"] = ghost_step(models[1], autocast, settings["l2_clip_norm"])
        error = check(model, models[1], steps, batch, settings["l2_clip_norm"])
        if not error <= TOLERANCE[settings["dtype"]]:
            raise RuntimeError(f"Opacus's sum of clipped gradients differs from one by one by {error:.2g} of its norm")

    def run(step: Step) -> None:
        step(batch)
        if device == "cuda":
            torch.cuda.synchronize()

    peaks = {name: _peak_bytes(functools.partial(run, step), models, device) for name, step in steps.items()}
    rounds = alternate({name: functools.partial(run, step) for name, step in steps.items()}, settings["repeats"])
    arms: dict[str, Any] = {
        name: {
            "reason": None,
            "seconds_of_rounds": seconds,
            "seconds": statistics.median(seconds),
            "time_ratio": median_ratio(seconds, rounds["plain"]),
            "examples_per_second": settings["batch_size"] / statistics.median(seconds),
            "peak_bytes": peaks[name],
        }
        for name, seconds in rounds.items()
    }
    arms["opacus_ghost"] = arms.get("opacus_ghost", {"reason": reason}) | {"relative_error": error}
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"device": name, "threads": torch.get_num_threads(), "arms": arms}


def make_model(settings: Mapping[str, Any]) -> torch.nn.Module:
    """The classifier, random, in float32."""
    sizes = dict(settings["hf_config"])
    config = transformers.AutoConfig.for_model(
        sizes.pop("model_type"),
        **sizes,
        num_labels=settings["num_labels"],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout=0.0,
    )
    return transformers.AutoModelForSequenceClassification.from_config(config)


def make_batch(settings: Mapping[str, Any], device: str) -> Batch:
    """Random tokens without padding. Everything has the batch axis: Opacus finds it in the inputs of every layer."""
    shape = (settings["batch_size"], settings["sequence_length"])
    ids = torch.randint(2, settings["hf_config"]["vocab_size"], shape)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        "labels": torch.randint(settings["num_labels"], shape[:1]),
    }
    if settings["hf_config"]["model_type"] == "bert":  # which else looks up one row of positions for the whole batch
        batch["position_ids"] = torch.arange(shape[1]).expand(shape).contiguous()
    return {name: tensor.to(device) for name, tensor in batch.items()}


def plain_step(model: torch.nn.Module, autocast: Callable[[], Any]) -> Step:
    """The gradient of the mean loss."""

    def step(batch: Batch) -> None:
        model.zero_grad()
        with autocast():
            loss = torch.nn.functional.cross_entropy(_logits(model, batch), batch["labels"])
        loss.backward()

    return step


def ghost_step(model: torch.nn.Module, autocast: Callable[[], Any], l2_clip_norm: float) -> Step:
    """The sum of the clipped gradients, as Opacus's documentation computes it."""
    import opacus  # here, because the plain step goes without

    example = torch.utils.data.TensorDataset(torch.zeros(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its random numbers are not secure, and that the data loader is a dummy
        private_model, optimizer, criterion, _ = opacus.PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
            data_loader=torch.utils.data.DataLoader(example),
            criterion=torch.nn.CrossEntropyLoss(),
            noise_multiplier=0.0,
            max_grad_norm=l2_clip_norm,
            poisson_sampling=False,
            grad_sample_mode="ghost",
        )

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        with autocast():
            loss = criterion(_logits(private_model, batch), batch["labels"])
        loss.backward()

    return step


def check(
    model: torch.nn.Module,
    private_model: torch.nn.Module,
    steps: Mapping[str, Step],
    batch: Batch,
    l2_clip_norm: float,
) -> float:
    """Relative difference, for the first two examples, of Opacus's sum to the sum of gradients taken one by one."""
    expected = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for index in range(min(2, len(batch["labels"]))):
        steps["plain"]({name: tensor[index : index + 1] for name, tensor in batch.items()})
        gradient = _gradient(model)
        factor = min(1.0, l2_clip_norm / _norm(gradient))
        expected = [total + factor * part for total, part in zip(expected, gradient, strict=True)]
    steps["opacus_ghost"]({name: tensor[:2] for name, tensor in batch.items()})
    return _norm([a - b for a, b in zip(_gradient(private_model), expected, strict=True)]) / _norm(expected)


def _gradient(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def _logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits


def _norm(tensors: Any) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors]).norm())


def _peak_bytes(run: Callable[[], object], models: Sequence[torch.nn.Module], device: str) -> int | None:
    """Of one step, with one of the equal models on the device; not known on the CPU."""
    for model in models:
        model.zero_grad()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run()  # also where nothing is measured: it warms up
    if device == "cpu":
        return None
    other_models = sum(parameter.nbytes for model in models[1:] for parameter in model.parameters())
    return torch.cuda.max_memory_allocated() - other_models


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
