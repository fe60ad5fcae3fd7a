"""The program: from settings to a fine-tuned model, its report and its privacy statement."""

from dp_rmt.extras import check_installed

MODULES = (
    *("datasets", "huggingface_hub", "jinja2", "matplotlib", "ml_collections", "orbax", "pyarrow", "sacrebleu"),
    *("safetensors", "tokenizers", "tqdm", "transformers"),
)
"""The modules that the extra "finetune" installs, by the names under which Python imports them."""

check_installed("finetune", MODULES)
