"""The arms of the privacy-utility-efficiency study, shared by the configs ``customersim*.py``.

Source: arXiv 2502.13313 compares full fine-tuning, DP-SGD and LoRA by what they memorise of sensitive tokens; denoising
and DP-LoRA are added here, and an epsilon is stated, which the paper does not.
"""

import math
from typing import Any

from ml_collections import ConfigDict

from configs import base
from configs.table_to_text import PROJECTIONS

LORA_RANKS = (2, 8, 32)
PRIVATE_RANK = 8


def memorisation(rates: dict[str, float], private: dict[str, Any], not_private: dict[str, Any]) -> ConfigDict:
    """All arms on CustomerSim at epsilon 8.

    Args:
      rates: learning rate of every arm.
      private: nested keys of all private arms, such as batch and steps.
      not_private: the same of the others.

    Returns:
      The unlocked config, without model and sizes.
    """
    config = base.get_config().unlock()
    config.data.task = "customersim"
    config.data.sensitive = ("attributes", "codes", "numbers")
    config.data.length_groups = ()
    config.model.head = "causal_lm"
    config.model.lora.targets = PROJECTIONS
    config.privacy.l2_clip_norm = 1.0
    config.privacy.nonprivate_metrics = False
    arms = {}
    for name, rank in (("full", None), *((f"lora_{rank}", rank) for rank in LORA_RANKS)):
        arms[name] = _arm(rank, rates[name], not_private)
        arms[name]["privacy"]["epsilon"] = math.inf
        arms[name]["denoise"] = ()
    for name, rank in (("full", None), (f"lora_{PRIVATE_RANK}", PRIVATE_RANK)):
        for kind in ("noisy", "denoised"):
            label = f"{name}_{kind}"
            arms[label] = _arm(rank, rates[label], private)
            if kind == "noisy":
                arms[label]["denoise"] = ()
    config.arms = arms
    return config


def _arm(rank: int | None, rate: float, shared: dict[str, Any]) -> dict[str, Any]:
    changes = {section: dict(values) for section, values in shared.items()}
    changes.setdefault("privacy", {})
    changes["train"] = {**changes.get("train", {}), "learning_rate": rate}
    if rank is not None:
        # alpha in step with the rank: a factor of 2 before the update, whatever the rank.
        changes["model"] = {"tuning": "lora", "lora": {"rank": rank, "alpha": 2.0 * rank}}
    return changes
