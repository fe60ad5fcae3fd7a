"""RoBERTa-large on SST-2 (67,349 examples, 202 updates) by the recipe of Li et al. 2022.

Source: arXiv 2110.05679; see configs/glue_recipe.py for the recipe and where this differs.
Expected: accuracy in %, without denoising: 93.04 at epsilon 3, 93.81 at epsilon 8 (Li et al. 2022, full + infilling);
with automatic clipping (--config.privacy.clip=automatic) 93.92 and 94.61 (Bu et al. 2023, arXiv 2206.07136). Not yet
run here.
Cost: an estimate, not a measurement: 1.2e16 FLOPs of training (8 x 303M parameters outside the embeddings x 202,047
examples x about 24 tokens with padding), 4 minutes at 50 TFLOP/s. Evaluation and the denoiser's eigendecompositions
come on top.
Command: python -m experiments.finetune --config=configs/sst2_roberta_large.py --workdir=runs/sst2_roberta_large
"""

from ml_collections import ConfigDict

from configs.glue_recipe import roberta


def get_config() -> ConfigDict:
    """Epsilon 8 with denoising; see the recipe for the other rows."""
    return roberta("sst2", "large")
