"""The recipe of Li et al. 2022 for text from tables, shared by the configs ``{e2e,dart}_MODEL.py``.

Source: Li et al. 2022, "Large Language Models Can Be Strong Differentially Private Learners" (arXiv 2110.05679): E2E
batch 1024, 10 epochs, learning rate 2e-3, delta 8e-6; DART 15 epochs, learning rate 5e-4, delta 1e-5; clip norm 0.1;
loss of the text's own tokens, a mean over each example. LoRA of GPT-2: rank 4, alpha 32, on query and value, and beam
search with 5 beams, length penalty 0.9 and no 4 tokens in a row twice, as in Hu et al. 2021 (arXiv 2106.09685) and Li &
Liang 2021 (arXiv 2101.00190). Published numbers are without denoising: --config.denoise.enabled=False.

Where this differs:

- Learning rate decays linearly to zero; there is no dropout; batches are Poisson samples of at most 5 standard
  deviations more than expected, and epsilon is computed by privacy loss distributions.
- DART's batch is E2E's, which is not published for it.
- For Llama and Qwen no private recipe is published for these tasks: batch, epochs, delta and clip norm are those above,
  the learning rates and LoRA on all projections are this project's and not tuned.
"""

from typing import Literal

from ml_collections import ConfigDict

from configs import base

Tuning = Literal["full", "lora"]
EPOCHS = {"e2e": 10.0, "dart": 15.0}
DELTA = {"e2e": 8e-6, "dart": 1e-5}
MAX_LENGTH = {"e2e": 160, "dart": 320}
GPT2_LEARNING_RATE = {"e2e": 2e-3, "dart": 5e-4}
LEARNING_RATE = {"full": 1e-4, "lora": 5e-4}
PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")


def decoder(task: Literal["e2e", "dart"], model: str, hub_name: str, tuning: str) -> ConfigDict:
    """A decoder on a task at epsilon 8; --config.privacy.epsilon=3 for the other row.

    Args:
      task: the data.
      model: as the config's file is called after the task.
      hub_name: where the model is.
      tuning: "full" or "lora"; what stands after the colon in --config=configs/e2e_gpt2.py:lora.

    Returns:
      The config.

    Raises:
      ValueError: the tuning is another.
    """
    if tuning not in LEARNING_RATE:
        raise ValueError(f"configs/{task}_{model}.py:{tuning}: after the colon stands 'full' or 'lora'")
    config = base.get_config().unlock()
    config.name = f"{task}_{model}" + ("_lora" if tuning == "lora" else "")
    config.data.task = task
    config.data.max_length = MAX_LENGTH[task]
    config.data.length_groups = (64, 96, 128, 192)
    config.model.path = hub_name
    config.model.head = "causal_lm"
    config.model.tuning = tuning
    config.privacy.epsilon = 8.0
    config.privacy.delta = DELTA[task]
    config.privacy.l2_clip_norm = 0.1
    config.privacy.expected_batch_size = 1024
    config.train.epochs = EPOCHS[task]
    config.train.eval_every = 100
    config.generation.length_penalty = 0.9
    config.generation.no_repeat_ngram_size = 4
    if model == "gpt2":
        config.optimizer.learning_rate = GPT2_LEARNING_RATE[task]
        config.model.lora.rank, config.model.lora.alpha = 4, 32.0
    else:
        config.optimizer.learning_rate = LEARNING_RATE[tuning]
        config.model.lora.rank, config.model.lora.alpha, config.model.lora.targets = 16, 32.0, PROJECTIONS
        config.model.dtype = "bfloat16"
        config.model.remat = True
    return config.lock()
