"""Whitened coordinates on MiniLM and SST-2: DP-Adam tuned as hard, whitening, and denoising in whitened coordinates.

Model, data and schedule are those of configs/sst2_minilm.py, at batch 1024. Every arm keeps the average of its iterates
(decay .7), and the study evaluates the average and the last iterate.

Source: dp_adam Li et al. 2022, with b1 .9 and .5; paper_b5 arXiv 2510.01137, kappa = 1. The others are this project's:
the arms that end in whitened are clipped, noised, denoised (as the paper, or Adam's first moment with the Tracy-Widom
gate) and given to Adam in the coordinates in which each layer's inputs are nearly white; after whitens behind Adam.
Expected: the table in experiments/studies/whitening/README.md.
Cost: 30 steps at batch 1024 take about seven minutes of one core of an Intel Xeon.
Command: python -m experiments.finetune --config=configs/sst2_whitening.py --config.data.path=DIR
With a tuned learning rate for each arm, over seeds: python -m experiments.studies.methods.study, same flags, and
    --results=experiments/studies/whitening/results/sst2 --batch_sizes=1024
"""

from ml_collections import ConfigDict

from configs import sst2_minilm
from configs.update_rules import WHITENED, adam

PAPER = (("denoise_matrices", {"gate": ("kappa", {"kappa": 1.0}), "svd": "subspace"}),)
MOMENT = ("denoised_adam", {"b1": 0.5, "gate": "tracy_widom", "second_moment": "denoised", "svd": "subspace"})


def get_config() -> ConfigDict:
    """All arms at epsilon 8 and batch 1024."""
    config = sst2_minilm.get_config().unlock()
    config.name = "sst2_whitening"
    config.denoise = ()
    config.privacy.expected_batch_size = 1024
    config.train.average_iterates = 0.7
    before = WHITENED["whitening"]
    small = {"l2_clip_norm": 1.25}  # as far above the mean norm in whitened coordinates as 3 is in raw ones
    config.arms = {
        "dp_adam": {"optimizer": adam(0.9), "train": {"learning_rate": 4e-3}},
        "dp_adam_b5": {"optimizer": adam(0.5), "train": {"learning_rate": 8e-3}},
        "after": {"optimizer": adam(0.5), "whitening": {"where": "after_optimizer"}, "train": {"learning_rate": 4e-3}},
        "whitened": {**WHITENED, "privacy": small, "train": {"learning_rate": 4e-3}},
        "paper_b5": {"denoise": PAPER, "optimizer": adam(0.5), "train": {"learning_rate": 2e-3}},
        "paper_whitened": {
            "denoise": PAPER,
            "optimizer": adam(0.5),
            "whitening": before,
            "privacy": small,
            "train": {"learning_rate": 2e-3},
        },
        "moment_whitened": {
            "optimizer": MOMENT,
            "whitening": before,
            "privacy": small,
            "train": {"learning_rate": 2e-3},
        },
    }
    return config.lock()
