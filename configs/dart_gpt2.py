"""GPT-2 (124M) on DART (62,659 examples, 918 updates) by the recipe of Li et al. 2022, in full or with LoRA.

Source: arXiv 2110.05679; see configs/text_recipe.py for the recipe and where this differs.
Expected: published, BLEU at epsilon 6.8 with LoRA: 38.5, not private 48.1 (Yu et al. 2022, arXiv 2110.06500, GPT-2
small). Not yet run here.
Cost: an estimate, not a measurement: 8.4e+16 FLOPs of training in full (8 x 0.124e9 parameters x 939,885 examples x
about 90 tokens with padding), 28 minutes at 50 TFLOP/s; LoRA takes about three quarters. Beam search comes on top.
Command: python -m experiments.finetune --config=configs/dart_gpt2.py --workdir=runs/dart_gpt2
With LoRA: --config=configs/dart_gpt2.py:lora
"""

from ml_collections import ConfigDict

from configs.text_recipe import decoder


def get_config(tuning: str = "full") -> ConfigDict:
    """Epsilon 8 with denoising, in full or with LoRA; see the recipe for the other rows."""
    return decoder("dart", "gpt2", "gpt2", tuning)
