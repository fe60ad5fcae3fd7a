"""Qwen3-1.7B on E2E (42,061 examples, 411 updates) by the recipe of Li et al. 2022, in full or with LoRA.

Source: arXiv 2110.05679; see configs/text_recipe.py for the recipe and where this differs.
Expected: not yet run here; nothing is published for this model and task under these settings.
Cost: an estimate, not a measurement: 4.1e+17 FLOPs of training in full (8 x 1.72e9 parameters x 420,610 examples x
about 70 tokens with padding), 135 minutes at 50 TFLOP/s; LoRA takes about three quarters. Beam search comes on top.
Command: python -m experiments.finetune --config=configs/e2e_qwen3_1_7b.py --workdir=runs/e2e_qwen3_1_7b
With LoRA: --config=configs/e2e_qwen3_1_7b.py:lora
"""

from ml_collections import ConfigDict

from configs.text_recipe import decoder


def get_config(tuning: str = "full") -> ConfigDict:
    """Epsilon 8 with denoising, in full or with LoRA; see the recipe for the other rows."""
    return decoder("e2e", "qwen3_1_7b", "Qwen/Qwen3-1.7B-Base", tuning)
