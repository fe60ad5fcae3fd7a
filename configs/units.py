"""The same training for two units of privacy, a row and a person, on data where persons have several rows.

"e2e": the unit is a text, or a meaning representation (4,862 of them have the 42,061 texts, 46 at most). "customersim":
the unit is a dialogue, or a customer (10,000 dialogues of about 7,900 customers, 4 at most).

Model: stories260K (Karpathy's llama2.c, MIT) as a Hugging Face folder: --config.model.path=DIR.
Data: --config.data.path=DIR, the folder of E2E's CSV files, or of simdial.tar.gz and database_20000.csv.

Source: user-level sampling is that of Charles et al. 2024 (arXiv 2407.07737); all else is configs/e2e_stories260k.py's.
Arms: row and person, each with about 256 rows in a step (64 meaning representations with 4 texts, or 200 customers with
at most 2 dialogues), at epsilon 8 and delta N^-1.1, N being the number of the arm's units.
Expected: not run yet; experiments/studies/units/README.md has the command and the cost.
Cost: see there.
Command: python -m experiments.finetune --config=configs/units.py:e2e --config.data.path=DIR --config.model.path=DIR
    (python -m experiments.finetune --config=configs/units.py is the same; customersim in the place of e2e)
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base
from configs.choices import choose

PERSONS: dict[str, dict[str, Any]] = {
    "e2e": {"data": {"user_column": "source"}, "privacy": {"expected_batch_size": 64, "rows_per_user": 4}},
    "customersim": {"data": {"user_column": "name"}, "privacy": {"expected_batch_size": 200, "rows_per_user": 2}},
}
"""What differs where the unit is a person."""


def get_config(chosen: str = "") -> ConfigDict:
    """Both arms at epsilon 8, on "e2e" or "customersim"."""
    (task,) = choose(chosen, "configs/units.py", task=PERSONS)
    config = base.get_config().unlock()
    config.name = "units" if task == "e2e" else "units_customersim"
    config.data.task = task
    config.data.max_length = 224 if task == "e2e" else 160
    config.data.length_groups = (128, 176) if task == "e2e" else (96, 128)
    config.data.max_eval_documents = 200
    config.model.head = "causal_lm"
    config.privacy.expected_batch_size = 256
    config.privacy.l2_clip_norm = 1.0
    config.train.learning_rate = 4e-3
    config.train.num_steps = 60
    config.train.microbatch_size = 8
    config.train.eval_every = 60
    config.train.checkpoint_every = 20
    config.train.eval_batch_size = 32
    config.denoise = ()
    config.generation.method = "greedy"
    config.generation.max_new_tokens = 120
    config.generation.max_prompts = 200
    config.arms = {"row": {}, "person": PERSONS[task]}
    return config.lock()
