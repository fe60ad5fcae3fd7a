"""RoBERTa-large on QQP (363,846 examples, 1,092 updates) by the recipe of Li et al. 2022.

Source: arXiv 2110.05679; see configs/glue_recipe.py for the recipe and where this differs.
Expected: accuracy in %, without denoising: 86.43 at epsilon 3, 87.47 at epsilon 8 (Li et al. 2022, full + infilling);
with automatic clipping (--config.privacy.clip=automatic) 86.76 and 87.47 (Bu et al. 2023, arXiv 2206.07136). Not yet
run here.
Cost: an estimate, not a measurement: 6.7e17 FLOPs of training (8 x 303M parameters outside the embeddings x 6,549,228
examples x about 42 tokens with padding), 3.7 hours at 50 TFLOP/s. Evaluation and the denoiser's eigendecompositions
come on top.
Command: python -m experiments.finetune --config=configs/qqp_roberta_large.py --workdir=runs/qqp_roberta_large
"""

from ml_collections import ConfigDict

from configs.glue_recipe import roberta


def get_config() -> ConfigDict:
    """Epsilon 8 with denoising; see the recipe for the other rows."""
    return roberta("qqp", "large")
