"""Every method of cleaning private gradients on one task: MiniLM on SST-2, an arm for each method.

Model, data and schedule are those of configs/sst2_minilm.py. The learning rate of an arm is the middle of those that
the study tries.

Source: dp_adam Li et al. 2022; paper arXiv 2510.01137, kappa = 1; partial its partial restoration, which keeps what is
below the edge; hard_threshold Gavish & Donoho 2014; truncate_rank
GaLore (arXiv 2403.03507), rank 4; low_pass DOPPLER (arXiv 2408.13460); kalman DiSK (arXiv 2410.03883), gain 0.7 and one
gradient a step; muon Jordan et al. 2024, with Adam's size of steps (arXiv 2502.16982); tracy_widom, stein, stream
and moment are this project's.
Expected: the table in experiments/README.md. Cost: 30 steps at batch 4096 take 20 minutes of one core of an AMD EPYC,
55 of an Intel Xeon.
Command: python -m experiments.finetune --config=configs/sst2_methods.py --config.data.path=DIR
With a tuned learning rate for each arm, over seeds: python -m experiments.studies.methods.study, same flags.
"""

from ml_collections import ConfigDict

from configs import sst2_minilm


def get_config() -> ConfigDict:
    """All arms at epsilon 8 and batch 4096."""
    config = sst2_minilm.get_config().unlock()
    config.name = "sst2_methods"
    config.arms = {
        "dp_adam": {"denoise": {"enabled": False}},
        "paper": {"denoise": {"gate": "kappa", "kappa": 1.0}},
        "partial": {"denoise": {"below_edge": "keep"}, "optimizer": {"learning_rate": 4e-3}},
        "tracy_widom": {"denoise": {"gate": "tracy_widom"}},
        "stein": {"denoise": {"gate": "tracy_widom", "blend": "stein"}},
        "stream": {"denoise": {"gate": "tracy_widom", "structure": "residual_stream"}},
        "stream_moment_adam": {
            "denoise": {"gate": "tracy_widom", "target": "first_moment", "structure": "residual_stream"},
            "optimizer": {"second_moment": "denoised"},
        },
        "moment": {
            "denoise": {"gate": "tracy_widom", "target": "first_moment"},
            "optimizer": {"learning_rate": 5e-4},
        },
        "moment_adam": {
            "denoise": {"gate": "tracy_widom", "target": "first_moment"},
            "optimizer": {"second_moment": "denoised"},
        },
        "moment_stein": {
            "denoise": {"gate": "tracy_widom", "target": "first_moment", "blend": "stein"},
            "optimizer": {"learning_rate": 5e-4},
        },
        "hard_threshold": {"denoise": {"shrinker": "hard_threshold", "rescale": "none"}},
        "truncate_rank": {"denoise": {"method": "truncate_rank"}},
        "low_pass": {"denoise": {"method": "low_pass"}},
        "kalman": {"denoise": {"method": "kalman"}},
        "muon": {"denoise": {"enabled": False}, "optimizer": {"name": "muon", "learning_rate": 4e-3}},
    }
    return config.lock()
