"""RoBERTa-large on QNLI (104,743 examples, 314 updates) by the recipe of Li et al. 2022.

Source: arXiv 2110.05679; see configs/glue_recipe.py for the recipe and where this differs.
Expected: accuracy in %, without denoising: 90.76 at epsilon 3, 91.10 at epsilon 8 (Li et al. 2022, full + infilling);
with automatic clipping (--config.privacy.clip=automatic) 91.01 and 91.45 (Bu et al. 2023, arXiv 2206.07136). Not yet
run here.
Cost: an estimate, not a measurement: 1.1e17 FLOPs of training (8 x 303M parameters outside the embeddings x 628,458
examples x about 70 tokens with padding), 36 minutes at 50 TFLOP/s. Evaluation and the denoiser's eigendecompositions
come on top.
Command: python -m experiments.finetune --config=configs/qnli_roberta_large.py --workdir=runs/qnli_roberta_large
"""

from ml_collections import ConfigDict

from configs.glue_recipe import roberta


def get_config() -> ConfigDict:
    """Epsilon 8 with denoising; see the recipe for the other rows."""
    return roberta("qnli", "large")
