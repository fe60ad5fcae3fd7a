"""RoBERTa-base on QQP (363,846 examples, 1,092 updates) by the recipe of Li et al. 2022.

Source: arXiv 2110.05679; see configs/glue_recipe.py for the recipe and where this differs.
Expected: not yet run here; the rows for RoBERTa-base in table 1 of Li et al. 2022 are not copied here.
Cost: an estimate, not a measurement: 1.9e17 FLOPs of training (8 x 86M parameters outside the embeddings x 6,549,228
examples x about 42 tokens with padding), 63 minutes at 50 TFLOP/s. Evaluation and the denoiser's eigendecompositions
come on top.
Command: python -m experiments.finetune --config=configs/qqp_roberta_base.py --workdir=runs/qqp_roberta_base
"""

from ml_collections import ConfigDict

from configs.glue_recipe import roberta


def get_config() -> ConfigDict:
    """Epsilon 8 with denoising; see the recipe for the other rows."""
    return roberta("qqp", "base")
