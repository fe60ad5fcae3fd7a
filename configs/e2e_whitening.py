"""Whitened coordinates on the small Llama and E2E (or DART): DP-Adam tuned as hard, whitening, denoising in it.

Model, data and schedule are those of configs/e2e_stories260k.py: all parameters (or LoRA), batch 256, 20 steps. Every
arm keeps the average of its iterates (decay .7); the average and the last iterate are evaluated at the end.

Source: the arms are those of configs/sst2_whitening.py.
Expected: the table in experiments/studies/whitening/README.md.
Cost: see there.
Command: python -m experiments.finetune --config=configs/e2e_whitening.py --config.data.path=DIR
    --config.model.path=DIR
With a tuned learning rate for each arm: python -m experiments.studies.methods.study, same flags, and
    --results=experiments/studies/whitening/results/e2e --batch_sizes=256 --epsilons=3 --selection_steps=20
LoRA: --config=configs/e2e_whitening.py:lora. DART: --config=configs/e2e_whitening.py:full,dart.
"""

from ml_collections import ConfigDict

from configs import e2e_stories260k, sst2_whitening
from configs.choices import choose


def get_config(chosen: str = "") -> ConfigDict:
    """All arms at epsilon 3, of "full" or "lora" on "e2e" or "dart"."""
    tuning, task = choose(chosen, "configs/e2e_whitening.py", tuning=("full", "lora"), task=("e2e", "dart"))
    config = e2e_stories260k.get_config(task).unlock()
    config.name = "e2e_whitening" if (tuning, task) == ("full", "e2e") else f"{task}_whitening_{tuning}"
    config.denoise = ()
    config.model.tuning = tuning
    config.privacy.epsilon = 3.0
    config.train.average_iterates = 0.7
    rates = {"dp_adam": 4e-3, "dp_adam_b5": 8e-3, "after": 8e-3, "whitened": 8e-3, "paper_b5": 4e-3}
    arms = sst2_whitening.get_config().arms.to_dict()
    config.arms = {
        name: {key: value for key, value in arm.items() if key != "privacy"}  # which is SST-2's clip norm
        | {"train": {"learning_rate": rates.get(name, 4e-3)}}
        for name, arm in arms.items()
    }
    return config.lock()
