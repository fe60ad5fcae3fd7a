"""The program: from settings to a fine-tuned model, its report and its privacy statement."""

from dp_rmt.extras import check_installed

check_installed(
    "finetune", ["datasets", "huggingface_hub", "matplotlib", "ml_collections", "orbax", "sacrebleu", "safetensors"]
)
check_installed("finetune", ["tokenizers", "tqdm", "transformers"])
