"""A real pre-trained Llama of 260,032 parameters on the real E2E (42,061 pairs), in full and with LoRA.

Model: stories260K (Karpathy's llama2.c, MIT) as a Hugging Face folder: --config.model.path=DIR.
Data: E2E's own CSV folder (CC BY-SA 4.0), or the hub (leave config.data.path out).

Arms: not private, noisy (DP-Adam) and denoised, each in full and with LoRA of rank 8 on every projection.

Source: delta that of Li et al. 2022 (arXiv 2110.05679); all else is this project's. The model knows 512 tokens and has
read children's stories alone, so that scores are far below GPT-2's.
Expected: the table in experiments/studies/texts/README.md. Cost: see there.
Command: python -m experiments.finetune --config=configs/e2e_stories260k.py --config.data.path=DIR
    --config.model.path=DIR
At epsilon 3: --config.privacy.epsilon=3. DART: --config=configs/e2e_stories260k.py:dart, where the dev split is
trained on (6,980 pairs), since that is what the study had, and texts are written for 638 rows of the test set, evenly
spaced: its longest prompt does not fit the model.
"""

import math
from typing import Any

from ml_collections import ConfigDict

from configs import base
from configs.choices import choose
from configs.table_to_text import DELTA, PROJECTIONS

RATES = {
    "full": 2e-3,
    "full_noisy": 4e-3,
    "full_denoised": 2e-3,
    "lora": 1e-2,
    "lora_noisy": 1e-2,
    "lora_denoised": 1e-2,
}
"""Chosen on E2E at epsilon 8 by `experiments.learning_rates`: experiments/studies/learning_rates/results/e2e.json."""


def get_config(chosen: str = "") -> ConfigDict:
    """All arms at epsilon 8, on "e2e" or "dart"."""
    (task,) = choose(chosen, "configs/e2e_stories260k.py", task=DELTA)
    config = base.get_config().unlock()
    config.name = "e2e_stories260k" if task == "e2e" else "dart_stories260k"
    config.data.task = task
    config.data.train_split = "train" if task == "e2e" else "dev"
    config.data.max_length = 224 if task == "e2e" else 320  # cuts 1% of the pairs
    config.data.length_groups = (128, 176) if task == "e2e" else (128, 224)
    config.model.head = "causal_lm"
    config.model.lora.rank, config.model.lora.alpha, config.model.lora.targets = 8, 16.0, PROJECTIONS
    config.privacy.delta = DELTA[task]
    config.privacy.expected_batch_size = 256
    config.privacy.l2_clip_norm = 1.0
    config.train.num_steps = 20
    config.train.microbatch_size = 32
    config.train.eval_every = 20  # an evaluation takes as long as some 4 steps
    config.train.checkpoint_every = 10
    config.train.eval_batch_size = 32
    config.generation.method = "greedy"
    config.generation.max_new_tokens = 120 if task == "e2e" else 88  # DART's longest prompt leaves no more of the 512
    config.generation.batch_size = 64
    config.generation.max_prompts = None if task == "e2e" else 640
    kinds: dict[str, dict[str, Any]] = {
        "": {"privacy": {"epsilon": math.inf}, "denoise": ()},
        "_noisy": {"denoise": ()},
        "_denoised": {},
    }
    config.arms = {
        f"{tuning}{kind}": {"model": {"tuning": tuning}, "train": {"learning_rate": RATES[tuning + kind]}} | changes
        for tuning in ("full", "lora")
        for kind, changes in kinds.items()
    }
    return config.lock()
