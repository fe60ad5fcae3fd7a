"""Decoders on text from tables by the recipe of Li et al. 2022: --config=configs/table_to_text.py:TASK,MODEL,TUNING.

TASK is e2e or dart, MODEL one of `MODELS`, and TUNING full or lora. A choice that is left out is the first of its kind.

Source: Li et al. 2022, "Large Language Models Can Be Strong Differentially Private Learners" (arXiv 2110.05679): E2E
batch 1024, 10 epochs, learning rate 2e-3, delta 8e-6; DART 15 epochs, learning rate 5e-4, delta 1e-5; clip norm 0.1;
loss of the text's own tokens, a mean over each example. LoRA of GPT-2: rank 4, alpha 32, on query and value, and beam
search with 5 beams, length penalty 0.9 and no 4 tokens in a row twice, as in Hu et al. 2021 (arXiv 2106.09685) and Li &
Liang 2021 (arXiv 2101.00190).

GPT-2 is trained in full by the update that won on E2E with the small Llama (experiments/README.md): Adam with b1 .5 in
whitened coordinates. The published one is --config.whitening.where=nowhere --config.optimizer="('adamw', {'b1': 0.9})".
LoRA gained nothing by it there, and larger models would need minutes and gigabytes before the first step for the
second moments of their widest layers. Nothing is denoised, which lost on E2E and DART in every pair of runs.

This differs from the source in four ways:

- The update of GPT-2 in full, as said above. The learning rate is that of the published update.

- The learning rate decays linearly to zero; there is no dropout; batches are Poisson samples of at most 5 standard
  deviations more than expected, and epsilon is computed by privacy loss distributions.
- DART's batch is E2E's: none is published for it.
- For Llama and Qwen no private recipe is published for these tasks: batch, epochs, delta and clip norm are those above,
  the learning rates and LoRA on all projections are this project's and not tuned.

Expected: the published numbers of GPT-2, of the published update. None has been run here yet, and nothing is published
for the other models on these tasks under these settings. E2E is Li et al. 2022, DART Yu et al. 2022 (arXiv 2110.06500,
GPT-2 small).

    choice          number          epsilon 3      epsilon 6.8  epsilon 8      not private
    e2e,gpt2,full   BLEU / ROUGE-L  61.52 / 65.67  -            63.19 / 66.43  69.46 / 71.36
    e2e,gpt2,lora   BLEU / ROUGE-L  58.15 / 65.77  -            63.39 / 67.53  -
    dart,gpt2,lora  BLEU            -              38.5         -              48.1

Cost: an estimate, not a measurement: FLOPs of training in full (8 x parameters x examples x tokens with padding, about
70 of E2E and 90 of DART) and their time at 50 TFLOP/s. LoRA takes about three quarters. Beam search comes on top.

    choice            examples  updates  examples seen  parameters  FLOPs   time
    e2e,gpt2            42,061      411        420,610     0.124e9  2.9e16   10 minutes
    e2e,llama3_2_1b     42,061      411        420,610      1.24e9  2.9e17   97 minutes
    e2e,llama3_2_3b     42,061      411        420,610      3.21e9  7.6e17  252 minutes
    e2e,qwen3_0_6b      42,061      411        420,610       0.6e9  1.4e17   47 minutes
    e2e,qwen3_1_7b      42,061      411        420,610      1.72e9  4.1e17  135 minutes
    e2e,qwen3_4b        42,061      411        420,610      4.02e9  9.5e17  316 minutes
    dart,gpt2           62,659      918        939,885     0.124e9  8.4e16   28 minutes
    dart,llama3_2_1b    62,659      918        939,885      1.24e9  8.4e17  280 minutes
    dart,llama3_2_3b    62,659      918        939,885      3.21e9  2.2e18  724 minutes
    dart,qwen3_0_6b     62,659      918        939,885       0.6e9  4.1e17  135 minutes
    dart,qwen3_1_7b     62,659      918        939,885      1.72e9  1.2e18  388 minutes
    dart,qwen3_4b       62,659      918        939,885      4.02e9  2.7e18  907 minutes

Command: python -m experiments.finetune --config=configs/table_to_text.py:e2e,gpt2,lora --workdir=runs/e2e_gpt2_lora
"""

from ml_collections import ConfigDict

from configs import base
from configs.choices import choose
from configs.update_rules import WHITENED

MODELS = {
    "gpt2": "gpt2",
    "llama3_2_1b": "meta-llama/Llama-3.2-1B",
    "llama3_2_3b": "meta-llama/Llama-3.2-3B",
    "qwen3_0_6b": "Qwen/Qwen3-0.6B-Base",
    "qwen3_1_7b": "Qwen/Qwen3-1.7B-Base",
    "qwen3_4b": "Qwen/Qwen3-4B-Base",
}
"""Where the hub has them."""

EPOCHS = {"e2e": 10.0, "dart": 15.0}
DELTA = {"e2e": 8e-6, "dart": 1e-5}
MAX_LENGTH = {"e2e": 160, "dart": 320}
GPT2_LEARNING_RATE = {"e2e": 2e-3, "dart": 5e-4}
LEARNING_RATE = {"full": 1e-4, "lora": 5e-4}
PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")


def get_config(chosen: str = "") -> ConfigDict:
    """A decoder on a task at epsilon 8; --config.privacy.epsilon=3 for the other row.

    Args:
      chosen: ``TASK,MODEL,TUNING``, keys of `EPOCHS`, `MODELS` and `LEARNING_RATE`.

    Returns:
      The config.

    Raises:
      ValueError: a choice is unknown.
    """
    file = "configs/table_to_text.py"
    task, model, tuning = choose(chosen, file, task=EPOCHS, model=MODELS, tuning=LEARNING_RATE)
    config = base.get_config().unlock()
    config.name = f"{task}_{model}" + ("_lora" if tuning == "lora" else "")
    config.update(WHITENED if (model, tuning) == ("gpt2", "full") else {"denoise": ()})
    config.data.task = task
    config.data.max_length = MAX_LENGTH[task]
    config.data.length_groups = (64, 96, 128, 192)
    config.model.path = MODELS[model]
    config.model.head = "causal_lm"
    config.model.tuning = tuning
    config.privacy.epsilon = 8.0
    config.privacy.delta = DELTA[task]
    config.privacy.l2_clip_norm = 0.1
    config.privacy.expected_batch_size = 1024
    config.train.epochs = EPOCHS[task]
    config.train.microbatch_size = 32
    config.train.eval_every = 100
    config.generation.length_penalty = 0.9
    config.generation.no_repeat_ngram_size = 4
    if model == "gpt2":
        config.train.learning_rate = GPT2_LEARNING_RATE[task]
        config.model.lora.rank, config.model.lora.alpha = 4, 32.0
    else:
        config.train.learning_rate = LEARNING_RATE[tuning]
        config.model.lora.rank, config.model.lora.alpha, config.model.lora.targets = 16, 32.0, PROJECTIONS
        config.model.dtype = "bfloat16"
        config.model.remat = True
    return config.lock()
