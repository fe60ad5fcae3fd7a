"""Differentially private fine-tuning of language models in JAX, with gradient denoising from random-matrix theory."""

from dp_rmt import random_matrix
from dp_rmt.accounting import calibrate_noise_multiplier, epsilon
from dp_rmt.batch_selection import PoissonSampling
from dp_rmt.clipping.ghost import ghost_clipped_grad
from dp_rmt.clipping.per_example import ClippedGradient, PerExample, clipped_grad
from dp_rmt.denoising.first_moment import scale_by_denoised_adam
from dp_rmt.denoising.gates import Kappa, TracyWidom
from dp_rmt.denoising.gradient import denoise_matrices
from dp_rmt.mechanism import DPSGD
from dp_rmt.noise_addition import add_gaussian_noise

__all__ = [
    "DPSGD",
    "ClippedGradient",
    "Kappa",
    "PerExample",
    "PoissonSampling",
    "TracyWidom",
    "add_gaussian_noise",
    "calibrate_noise_multiplier",
    "clipped_grad",
    "denoise_matrices",
    "epsilon",
    "ghost_clipped_grad",
    "random_matrix",
    "scale_by_denoised_adam",
]
