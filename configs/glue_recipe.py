"""The recipe of Li et al. 2022 for GLUE, shared by the configs ``{sst2,qnli,qqp,mnli}_roberta_{base,large}.py``.

Source: Li et al. 2022, "Large Language Models Can Be Strong Differentially Private Learners" (arXiv 2110.05679), and
the launcher of its code (lxuechen/private-transformers, examples/classification/run_wrapper.py): text infilling, batch
1000 k and 3 k epochs with k = 1, 2, 6, 6 for SST-2, QNLI, QQP, MNLI, Adam at 5e-4 with linear decay to zero, clip norm
0.1, 256 tokens. Its published numbers are without denoising: --config.denoise.enabled=False.

Where this differs:

- delta is N^-1.1, batches are Poisson samples of at most 5 standard deviations more than expected, and epsilon is
  computed by privacy loss distributions.
- There is no dropout.
- Of rows longer than 256 tokens the longer text is cut at its end.
"""

from typing import Literal

from ml_collections import ConfigDict

from configs import base

SCALE = {"sst2": 1, "qnli": 2, "qqp": 6, "mnli": 6}
"""The factor of batch size and epochs, which keeps the sampling probability of the four tasks near each other."""


def roberta(task: str, size: Literal["base", "large"]) -> ConfigDict:
    """RoBERTa on a GLUE task at epsilon 8; --config.privacy.epsilon=3 for the other row.

    Args:
      task: a key of `SCALE`.
      size: of the model, which the hub has under ``roberta-base`` and ``roberta-large``.

    Returns:
      The config.
    """
    config = base.get_config().unlock()
    config.name = f"{task}_roberta_{size}"
    config.data.task = task
    config.data.max_length = 256
    config.data.length_groups = (16, 32, 64, 128)
    config.model.path = f"roberta-{size}"
    config.model.head = "infilling"
    config.privacy.epsilon = 8.0
    config.privacy.l2_clip_norm = 0.1
    config.privacy.expected_batch_size = 1000 * SCALE[task]
    config.optimizer.learning_rate = 5e-4
    config.train.epochs = 3.0 * SCALE[task]
    config.train.eval_every = 20 * SCALE[task]
    return config.lock()
