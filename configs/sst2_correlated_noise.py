"""Correlated noise against independent noise at the same epsilon, with and without denoising: MiniLM on SST-2.

Model and data are those of configs/sst2_minilm.py, with batches of 1024 for 30 steps, or of 256 for 300 steps, so that
up to 64 bands fit. The learning rate of an arm is the middle of those that the study tries first.

Source: Choquette-Choo et al. 2023 (arXiv 2306.08153), square-root bands by Kalinin & Lampert 2024 (arXiv 2405.13763).
Bands are those of the least noise by `experiments.noise_bands`: in sums, and in the first moment where it is denoised.
Expected: the table in experiments/studies/correlated_noise/README.md. At equal epsilon the noise of sums is .67 of
DP-SGD's over 30 steps and .42 over 300, and that of the first moment .80 (docs/design/0023-correlated-noise.md).
Cost: a step of 1024 takes about 10 seconds of one core of an AMD EPYC, a step of 256 about 3.
Command: python -m experiments.finetune --config=configs/sst2_correlated_noise.py:300 --config.data.path=DIR
With a tuned learning rate for each arm: python -m experiments.studies.methods.study with the same flags and
--epsilons=8 --seeds=0 --batch_sizes=256 --selection_steps=90 (or 1024 and 12)
--results=experiments/studies/correlated_noise/results/300
"""

from typing import Any

from ml_collections import ConfigDict

from configs import sst2_minilm
from configs.choices import choose

BANDS = {"30": 8, "300": 32}
BATCH_SIZES = {"30": 1024, "300": 256}
BANDS_OF_MOMENT = 4
MOMENT: dict[str, Any] = {
    "denoise": (),
    "optimizer": ("denoised_adam", {"gate": "tracy_widom", "svd": "subspace"}),
}
GRADIENT: dict[str, Any] = {"denoise": (("denoise_matrices", {"gate": "tracy_widom", "svd": "subspace"}),)}


def get_config(chosen: str = "") -> ConfigDict:
    """All arms at epsilon 8; after the colon stands the number of steps, 30 or 300."""
    (steps,) = choose(chosen, "configs/sst2_correlated_noise.py", steps=tuple(BANDS))
    config = sst2_minilm.get_config().unlock()
    config.name = "sst2_correlated_noise"
    config.privacy.expected_batch_size = BATCH_SIZES[steps]
    config.train.num_steps = int(steps)
    config.train.eval_every = int(steps) // 10
    config.train.checkpoint_every = int(steps) // 3
    correlated = {"privacy": {"noise_bands": BANDS[steps]}}
    fast, slow = ({"train": {"learning_rate": rate}} for rate in ((4e-3, 1e-3) if steps == "30" else (1e-3, 5e-4)))
    config.arms = {
        "dp_adam": {"denoise": (), **fast},
        "gradient": {**GRADIENT, **slow},
        "moment": {**MOMENT, **slow},
        "correlated": {"denoise": (), **correlated, **fast},
        "correlated_gradient": {**GRADIENT, **correlated, **slow},
        "correlated_moment": {**MOMENT, "privacy": {"noise_bands": BANDS_OF_MOMENT}, **slow},
    }
    return config.lock()
