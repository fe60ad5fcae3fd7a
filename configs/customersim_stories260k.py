"""A real pre-trained Llama of 260,032 parameters on CustomerSim's dialogues: what it memorises, by every method.

Model: stories260K (Karpathy's llama2.c, MIT) as a Hugging Face folder: --config.model.path=DIR.
Data: the folder with simdial.tar.gz and database_20000.csv of github.com/wyshi/lm_privacy (MIT; Apache-2.0).

Source: arXiv 2502.13313, with the arms of configs/customersim_recipe.py. 200 dialogues and the ten canary files. So
that the study fits a quarter of an hour of one core, a dialogue begins with its fourth line (the customer's name) and
ends at 80 tokens: the name and the number are there, most tracking numbers and the good-byes are not.
Expected: the table in experiments/studies/memorisation/README.md. Cost: see there.
Command: python -m experiments.studies.memorisation.study --config=configs/customersim_stories260k.py
    --config.data.path=DIR
    --config.model.path=DIR
One arm trains with python -m experiments.finetune --config=configs/customersim_stories260k.py, too.
"""

from ml_collections import ConfigDict

from configs.customersim_recipe import memorisation

RATES = {
    "full": 1.25e-3,
    "lora_2": 2e-2,
    "lora_8": 2e-2,
    "lora_32": 2.5e-3,
    "full_noisy": 1e-2,
    "full_denoised": 1e-2,
    "lora_8_noisy": 2e-2,
    "lora_8_denoised": 2e-2,
}
"""With the lowest loss on dev at the end of a whole run (seed 0), among factors of 2; full fine-tuning and rank 32
without privacy are flat over a factor of 4 and more (experiments/studies/learning_rates/results/customersim.json).
"""


def get_config() -> ConfigDict:
    """All arms at epsilon 8; --config.privacy.epsilon=3 for the private ones at another."""
    config = memorisation(
        RATES,
        private={"privacy": {"expected_batch_size": 64}, "train": {"num_steps": 15}},
        not_private={"privacy": {"expected_batch_size": 16}, "train": {"num_steps": 75}},
    )
    config.name = "customersim_stories260k"
    config.data.skip_lines = 3
    config.data.max_length = 80
    config.data.max_train_examples = 200
    config.data.max_eval_documents = 200
    config.train.microbatch_size = 16
    config.train.eval_every = 1000
    config.train.eval_batch_size = 50
    config.train.checkpoint_every = 20
    return config.lock()
