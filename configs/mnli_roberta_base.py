"""RoBERTa-base on MNLI (392,702 examples, 1,178 updates) by the recipe of Li et al. 2022.

Source: arXiv 2110.05679; see configs/glue_recipe.py for the recipe and where this differs.
Expected: not yet run here; the rows for RoBERTa-base in table 1 of Li et al. 2022 are not copied here. For
orientation, another recipe: 83.5 % at epsilon 6.7 with LoRA (Yu et al. 2022, arXiv 2110.06500).
Cost: an estimate, not a measurement: 2.5e17 FLOPs of training (8 x 86M parameters outside the embeddings x 7,068,636
examples x about 52 tokens with padding), 84 minutes at 50 TFLOP/s. Evaluation and the denoiser's eigendecompositions
come on top.
Command: python -m experiments.finetune --config=configs/mnli_roberta_base.py --workdir=runs/mnli_roberta_base
"""

from ml_collections import ConfigDict

from configs.glue_recipe import roberta


def get_config() -> ConfigDict:
    """Epsilon 8 with denoising; see the recipe for the other rows."""
    return roberta("mnli", "base")
