"""Every method of cleaning private gradients on one task: MiniLM on SST-2, an arm for each method.

Model, data and schedule are those of configs/sst2_minilm.py. The learning rate of an arm is the middle of those that
the study tries.

Source: dp_adam Li et al. 2022; paper arXiv 2510.01137, kappa = 1; partial its partial restoration, which keeps what is
below the edge; hard_threshold Gavish & Donoho 2014; truncate_rank
GaLore (arXiv 2403.03507), rank 4; low_pass DOPPLER (arXiv 2408.13460); kalman DiSK (arXiv 2410.03883), gain 0.7 and one
gradient a step; muon Jordan et al. 2024, with Adam's size of steps (arXiv 2502.16982); tracy_widom, stein, stream
and moment are this project's.
Expected: the table in experiments/studies/methods/README.md.
Cost: 30 steps at batch 4096 take 20 minutes of one core of an AMD EPYC,
55 of an Intel Xeon.
Command: python -m experiments.finetune --config=configs/sst2_methods.py --config.data.path=DIR
With a tuned learning rate for each arm, over seeds: python -m experiments.studies.methods.study, same flags.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import sst2_minilm

STREAM = {"matrix_rule": "layers_side_by_side", "join": "reads_the_stream"}
"""All that reads the residual stream, of all layers, as one matrix."""
ADAMW = ("adamw", {"weight_decay": 0.0})
MUON = ("muon", {"consistent_rms": 0.2, "others": ADAMW})
"""With steps of Adam's size, so that one learning rate serves both."""


def denoised(**options: Any) -> tuple[tuple[str, dict[str, Any]], ...]:
    """The gradient, denoised with these options."""
    return (("denoise_matrices", {"svd": "subspace", **options}),)


def denoised_adam(**options: Any) -> dict[str, Any]:
    """An arm whose first moment is denoised, in the place of the gradient."""
    given = {"gate": "tracy_widom", "svd": "subspace", **options}
    return {"denoise": (), "optimizer": ("denoised_adam", given)}


def get_config() -> ConfigDict:
    """All arms at epsilon 8 and batch 4096."""
    config = sst2_minilm.get_config().unlock()
    config.name = "sst2_methods"
    config.arms = {
        "dp_adam": {"denoise": ()},
        "paper": {"denoise": denoised(gate=("kappa", {"kappa": 1.0}))},
        "partial": {"denoise": denoised(below_edge="keep"), "train": {"learning_rate": 4e-3}},
        "tracy_widom": {"denoise": denoised(gate="tracy_widom")},
        "stein": {"denoise": denoised(gate="tracy_widom", blend="stein")},
        "stream": {"denoise": denoised(gate="tracy_widom", **STREAM)},
        "stream_moment_adam": denoised_adam(second_moment="denoised", **STREAM),
        "moment": {**denoised_adam(), "train": {"learning_rate": 5e-4}},
        "moment_adam": denoised_adam(second_moment="denoised"),
        "moment_stein": {**denoised_adam(blend="stein"), "train": {"learning_rate": 5e-4}},
        "hard_threshold": {"denoise": denoised(shrinker="hard_threshold", rescale="none")},
        "truncate_rank": {"denoise": (("truncate_rank", {"rank": 4}),)},
        "low_pass": {"denoise": ("low_pass_filter",)},
        "kalman": {"denoise": (), "optimizer": ("kalman_filter", {"optimizer": ADAMW, "kappa": 0.7})},
        "muon": {"denoise": (), "optimizer": MUON, "train": {"learning_rate": 4e-3}},
    }
    return config.lock()
