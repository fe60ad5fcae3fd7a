"""RoBERTa-large on MNLI (392,702 examples, 1,178 updates) by the recipe of Li et al. 2022.

Source: arXiv 2110.05679; see configs/glue_recipe.py for the recipe and where this differs.
Expected: accuracy in %, matched / mismatched, without denoising: 86.43 / 86.46 at epsilon 3, 87.02 / 87.26 at epsilon
8 (Li et al. 2022, full + infilling); with automatic clipping (--config.privacy.clip=automatic) 86.27 / 86.67 and
87.07 / 87.16 (Bu et al. 2023, arXiv 2206.07136). Not yet run here.
Cost: an estimate, not a measurement: 8.9e17 FLOPs of training (8 x 303M parameters outside the embeddings x 7,068,636
examples x about 52 tokens with padding), 4.9 hours at 50 TFLOP/s. Evaluation and the denoiser's eigendecompositions
come on top.
Command: python -m experiments.finetune --config=configs/mnli_roberta_large.py --workdir=runs/mnli_roberta_large
"""

from ml_collections import ConfigDict

from configs.glue_recipe import roberta


def get_config() -> ConfigDict:
    """Epsilon 8 with denoising; see the recipe for the other rows."""
    return roberta("mnli", "large")
