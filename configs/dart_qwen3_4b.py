"""Qwen3-4B on DART (62,659 examples, 918 updates) by the recipe of Li et al. 2022, in full or with LoRA.

Source: arXiv 2110.05679; see configs/text_recipe.py for the recipe and where this differs.
Expected: not yet run here; nothing is published for this model and task under these settings.
Cost: an estimate, not a measurement: 2.7e+18 FLOPs of training in full (8 x 4.02e9 parameters x 939,885 examples x
about 90 tokens with padding), 907 minutes at 50 TFLOP/s; LoRA takes about three quarters. Beam search comes on top.
Command: python -m experiments.finetune --config=configs/dart_qwen3_4b.py --workdir=runs/dart_qwen3_4b
With LoRA: --config=configs/dart_qwen3_4b.py:lora
"""

from ml_collections import ConfigDict

from configs.text_recipe import decoder


def get_config(tuning: str = "full") -> ConfigDict:
    """Epsilon 8 with denoising, in full or with LoRA; see the recipe for the other rows."""
    return decoder("dart", "qwen3_4b", "Qwen/Qwen3-4B-Base", tuning)
