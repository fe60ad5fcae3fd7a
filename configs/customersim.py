"""CustomerSim by a decoder from the hub, in all arms of the study: --config=configs/customersim.py:MODEL.

MODEL: pythia_160m, gemma3_1b, llama3_2_1b, qwen3_0_6b (after the colon; the first if there is none).
Data: the folder with simdial.tar.gz and database_20000.csv of github.com/wyshi/lm_privacy (MIT; Apache-2.0).

Source: arXiv 2502.13313, which has Pythia, Gemma, Llama and Qwen at rank 16 and one epsilon it does not state; the arms
are those of configs/customersim_recipe.py, on all 10,000 dialogues, 3 epochs, batch 512 with noise and 32 without.
Learning rates are this project's and not tuned.
Expected: not run. Cost: not measured.
Command: python -m experiments.studies.memorisation.study --config=configs/customersim.py:qwen3_0_6b
    --config.data.path=DIR
    --workdir=runs/customersim_qwen --results=experiments/studies/memorisation/results/qwen
One set of arms without the measures: python -m experiments.finetune --config=configs/customersim.py
"""

from ml_collections import ConfigDict

from configs.choices import choose
from configs.customersim_recipe import memorisation

MODELS = {
    "pythia_160m": "EleutherAI/pythia-160m",
    "gemma3_1b": "google/gemma-3-1b-pt",
    "llama3_2_1b": "meta-llama/Llama-3.2-1B",
    "qwen3_0_6b": "Qwen/Qwen3-0.6B-Base",
}
RATES = {
    "full": 2e-5,
    "lora_2": 2e-4,
    "lora_8": 2e-4,
    "lora_32": 2e-4,
    "full_noisy": 1e-4,
    "full_denoised": 1e-4,
    "lora_8_noisy": 5e-4,
    "lora_8_denoised": 5e-4,
}


def get_config(chosen: str = "") -> ConfigDict:
    """All arms of one model at epsilon 8."""
    (model,) = choose(chosen, "configs/customersim.py", model=MODELS)
    config = memorisation(
        RATES,
        private={"privacy": {"expected_batch_size": 512}},
        not_private={"privacy": {"expected_batch_size": 32}},
    )
    config.name = "customersim"
    config.data.max_length = 256
    config.data.length_groups = (128, 192)
    config.data.max_eval_documents = 1000
    config.model.path = MODELS[model]
    config.model.dtype = "bfloat16"
    config.model.remat = True
    config.train.epochs = 3.0
    config.train.eval_every = 1000
    return config.lock()
