"""Differentially private fine-tuning of language models in JAX, with gradient denoising from random-matrix theory.

`import dp_rmt` loads nothing else. A public name, or a room such as `dp_rmt.models`, is loaded when it is first used
(PEP 562), so that a program can parse its command line and prepare its process before JAX starts.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

__version__ = "0.2.0"

__all__ = [
    "DPSGD",
    "ClippedGradient",
    "Execution",
    "Finetuned",
    "Kappa",
    "PerExample",
    "PoissonSampling",
    "TracyWidom",
    "add_gaussian_noise",
    "calibrate_noise_multiplier",
    "clipped_grad",
    "denoise_matrices",
    "epsilon",
    "finetune",
    "ghost_clipped_grad",
    "random_matrix",
    "scale_by_denoised_adam",
]

if TYPE_CHECKING:  # a type checker reads these lines, and reports a misspelt name, which it would not with __getattr__
    from dp_rmt import random_matrix
    from dp_rmt.accounting import calibrate_noise_multiplier, epsilon
    from dp_rmt.batch_selection import PoissonSampling
    from dp_rmt.clipping.execution import Execution
    from dp_rmt.clipping.ghost import ghost_clipped_grad
    from dp_rmt.clipping.per_example import ClippedGradient, PerExample, clipped_grad
    from dp_rmt.denoising.first_moment import scale_by_denoised_adam
    from dp_rmt.denoising.gates import Kappa, TracyWidom
    from dp_rmt.denoising.gradient import denoise_matrices
    from dp_rmt.finetuning.door import Finetuned, finetune
    from dp_rmt.mechanism import DPSGD
    from dp_rmt.noise_addition import add_gaussian_noise
else:
    # The same names by the module that defines them. tests/laws/test_import_is_light.py compares the three lists.
    _NAMES_OF_MODULE = {
        "dp_rmt.accounting": ("calibrate_noise_multiplier", "epsilon"),
        "dp_rmt.batch_selection": ("PoissonSampling",),
        "dp_rmt.clipping.ghost": ("ghost_clipped_grad",),
        "dp_rmt.clipping.per_example": ("ClippedGradient", "PerExample", "clipped_grad"),
        "dp_rmt.denoising.first_moment": ("scale_by_denoised_adam",),
        "dp_rmt.denoising.gates": ("Kappa", "TracyWidom"),
        "dp_rmt.denoising.gradient": ("denoise_matrices",),
        "dp_rmt.finetuning.door": ("Finetuned", "finetune"),
        "dp_rmt.clipping.execution": ("Execution",),
        "dp_rmt.mechanism": ("DPSGD",),
        "dp_rmt.noise_addition": ("add_gaussian_noise",),
    }
    _MODULE_OF_NAME = {name: module for module, names in _NAMES_OF_MODULE.items() for name in names}

    def __getattr__(name: str) -> object:
        if name in _MODULE_OF_NAME:
            value = getattr(importlib.import_module(_MODULE_OF_NAME[name]), name)
        elif not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
            value = importlib.import_module(f"{__name__}.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value  # the next use finds it without this function
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
