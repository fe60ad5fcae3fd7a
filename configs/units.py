"""The same training for two units of privacy, a row and a person, on data where persons have several rows.

"e2e": the unit is a text, or a meaning representation (4,862 of them have the 42,061 texts, 46 at most). "customersim":
the unit is a dialogue, or a customer (10,000 dialogues of about 7,900 customers, 4 at most).

Model: stories260K (Karpathy's llama2.c, MIT) as a Hugging Face folder: --config.model.path=DIR.
Data: --config.data.path=DIR, the folder of E2E's CSV files, or of simdial.tar.gz and database_20000.csv.

Source: user-level sampling is that of Charles et al. 2024 (arXiv 2407.07737); all else is configs/e2e_stories260k.py's.
Arms: row; person (64 meaning representations with 4 texts, or 200 customers with at most 2 dialogues); person_one_row
(256 persons with one row). Each has about 256 rows in a step, epsilon 8, and delta N^-1.1 for N of its units.
Expected: the table in experiments/studies/units/README.md.
Cost: see there.
Command: python -m experiments.finetune --config=configs/units.py:e2e --config.data.path=DIR --config.model.path=DIR
    (python -m experiments.finetune --config=configs/units.py is the same; customersim in the place of e2e)
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base
from configs.choices import choose

COLUMNS = {"e2e": "source", "customersim": "name"}
"""What says whose a row is."""
SEVERAL = {"e2e": (64, 4), "customersim": (200, 2)}
"""``(persons in a step, at most so many rows of each)``, about 256 rows in all."""


def get_config(chosen: str = "") -> ConfigDict:
    """All arms at epsilon 8, on "e2e" or "customersim"."""
    (task,) = choose(chosen, "configs/units.py", task=COLUMNS)
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
    config.arms = {"row": {}, "person": _of_persons(task, *SEVERAL[task]), "person_one_row": _of_persons(task, 256, 1)}
    return config.lock()


def _of_persons(task: str, persons: int, rows: int) -> dict[str, Any]:
    privacy = {"expected_batch_size": persons, "rows_per_user": rows}
    return {"data": {"user_column": COLUMNS[task]}, "privacy": privacy}
