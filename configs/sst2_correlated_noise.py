"""Correlated noise against independent noise at the same epsilon, with and without denoising: MiniLM on SST-2.

Model, data and schedule are those of configs/sst2_minilm.py, with batches of 1024 for 30 or 300 steps, so that up to 64
bands fit. The learning rate of an arm is the middle of those that the study tries.

Source: Choquette-Choo et al. 2023 (arXiv 2306.08153), square-root bands by Kalinin & Lampert 2024 (arXiv 2405.13763).
Bands are those of the least noise by `experiments.noise_bands`: in sums, and in the first moment where it is denoised.
Expected: not run yet. At equal epsilon the noise of sums is about .7 of DP-SGD's over 30 steps and .57 over 300, and
that of the first moment .87 (docs/design/0023-correlated-noise.md).
Cost: a step takes 10 to 12 seconds of one core of an AMD EPYC: all arms of 30 steps take half an hour, those of 300
steps 5.5 hours. With tuned rates it is 1.5 and 6.5 hours for the first seed and epsilon.
Command: python -m experiments.finetune --config=configs/sst2_correlated_noise.py:300 --config.data.path=DIR
With a tuned learning rate for each arm, over seeds: python -m experiments.studies.methods.study with the same flags and
--batch_sizes=1024 --selection_steps=12 --results=experiments/studies/methods/results/sst2_correlated_noise_300
"""

from typing import Any

from ml_collections import ConfigDict

from configs import sst2_minilm
from configs.choices import choose

BANDS = {"30": 8, "300": 32}
BANDS_OF_MOMENT = 4
MOMENT: dict[str, Any] = {
    "denoise": (),
    "optimizer": ("denoised_adam", {"gate": "tracy_widom", "svd": "subspace"}),
}
GRADIENT: dict[str, Any] = {"denoise": (("denoise_matrices", {"gate": "tracy_widom", "svd": "subspace"}),)}


def get_config(chosen: str = "") -> ConfigDict:
    """All arms at epsilon 8 and batch 1024; after the colon stands the number of steps, 30 or 300."""
    (steps,) = choose(chosen, "configs/sst2_correlated_noise.py", steps=tuple(BANDS))
    config = sst2_minilm.get_config().unlock()
    config.name = "sst2_correlated_noise"
    config.privacy.expected_batch_size = 1024
    config.train.num_steps = int(steps)
    correlated = {"privacy": {"noise_bands": BANDS[steps]}}
    config.arms = {
        "dp_adam": {"denoise": ()},
        "gradient": GRADIENT,
        "moment": MOMENT,
        "correlated": {"denoise": (), **correlated},
        "correlated_gradient": {**GRADIENT, **correlated},
        "correlated_moment": {**MOMENT, "privacy": {"noise_bands": BANDS_OF_MOMENT}},
    }
    return config.lock()
