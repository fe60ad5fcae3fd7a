"""RoBERTa-base on SST-2 (67,349 examples, 202 updates) by the recipe of Li et al. 2022.

Source: arXiv 2110.05679; see configs/glue_recipe.py for the recipe and where this differs.
Expected: not yet run here; the rows for RoBERTa-base in table 1 of Li et al. 2022 are not copied here.
Cost: an estimate, not a measurement: 3.3e15 FLOPs of training (8 x 86M parameters outside the embeddings x 202,047
examples x about 24 tokens with padding), 67 seconds at 50 TFLOP/s. Evaluation and the denoiser's eigendecompositions
come on top.
Command: python -m experiments.finetune --config=configs/sst2_roberta_base.py --workdir=runs/sst2_roberta_base
"""

from ml_collections import ConfigDict

from configs.glue_recipe import roberta


def get_config() -> ConfigDict:
    """Epsilon 8 with denoising; see the recipe for the other rows."""
    return roberta("sst2", "base")
