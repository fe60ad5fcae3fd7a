"""GPT-2 (124M) on E2E (42,061 examples, 411 updates) by the recipe of Li et al. 2022, in full or with LoRA.

Source: arXiv 2110.05679; see configs/text_recipe.py for the recipe and where this differs.
Expected: published, BLEU and ROUGE-L: epsilon 8 in full 63.19 and 66.43, LoRA 63.39 and 67.53; epsilon 3 61.52 and
65.67, 58.15 and 65.77; not private 69.46 and 71.36 (Li et al. 2022). Not yet run here.
Cost: an estimate, not a measurement: 2.9e+16 FLOPs of training in full (8 x 0.124e9 parameters x 420,610 examples x
about 70 tokens with padding), 10 minutes at 50 TFLOP/s; LoRA takes about three quarters. Beam search comes on top.
Command: python -m experiments.finetune --config=configs/e2e_gpt2.py --workdir=runs/e2e_gpt2
With LoRA: --config=configs/e2e_gpt2.py:lora
"""

from ml_collections import ConfigDict

from configs.text_recipe import decoder


def get_config(tuning: str = "full") -> ConfigDict:
    """Epsilon 8 with denoising, in full or with LoRA; see the recipe for the other rows."""
    return decoder("e2e", "gpt2", "gpt2", tuning)
