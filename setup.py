"""Packaging of dp_rmt. The tools (ruff, mypy, pytest) are configured in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)

REPORT = ["matplotlib>=3.9"]
FINETUNE = [
    "datasets>=4.0",
    "huggingface_hub>=1.0",
    "jinja2>=3.1",  # what chat templates are written in; transformers asks for it only as one is used
    "ml-collections>=1.0",
    "orbax-checkpoint>=0.11.30",
    "pyarrow>=18.0",  # Parquet; datasets brings it, too
    "sacrebleu>=2.5",
    "safetensors>=0.6",
    "tokenizers>=0.22",
    "tqdm>=4.66",
    "transformers>=5.0",
    *REPORT,  # every run writes report.html
]
# METEOR and the official tokenizer of ROUGE-L and CIDEr; needs Java, too.
METEOR = ["pycocoevalcap>=1.2"]
PRESIDIO = ["presidio-analyzer>=2.2"]  # data.sensitive="presidio"; needs a spaCy model, too
TENSORBOARD = ["tensorboard>=2.18"]  # writers.to=("tensorboard",)
WANDB = ["wandb>=0.19.11"]  # writers.to=("wandb",)
SLURM = ["submitit>=1.5"]  # sweeps with --executor=submitit

setup(
    name="dp_rmt",
    version=VERSION.findall((ROOT / "dp_rmt" / "__init__.py").read_text(encoding="utf-8"))[0],
    description="Differentially private fine-tuning of language models with random-matrix denoising",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # The studies, the benchmarks and the configs are run from the root of a checkout: such common top-level names do
    # not belong into site-packages.
    packages=find_packages(include=["dp_rmt", "dp_rmt.*"]),
    package_data={"dp_rmt": ["py.typed"]},
    entry_points={"console_scripts": ["dp-rmt = dp_rmt.finetuning.console:main"]},
    # What the pieces need: clipping, noise, denoising, sampling, accounting, the models. The program needs "finetune".
    install_requires=[
        "absl-py>=2.1",
        "dp-accounting>=0.6",  # the first with truncated Poisson sampling
        "flax>=0.12",
        "jax>=0.10",
        "jaxlib>=0.10",
        "numpy>=2.0",
        "optax>=0.2.8",
        "scipy>=1.14",
    ],
    extras_require={
        "finetune": FINETUNE,
        "report": REPORT,
        "meteor": METEOR,
        "presidio": PRESIDIO,
        "slurm": SLURM,
        "tensorboard": TENSORBOARD,
        "wandb": WANDB,
        "all": [*FINETUNE, *METEOR, *PRESIDIO, *SLURM, *TENSORBOARD, *WANDB],
        "test": [
            *FINETUNE,
            "hypothesis>=6.100",
            "mypy>=1.15",
            "pre-commit>=4.0",
            "pytest>=8.4",
            "pytest-cov>=6.0",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
        ],
        # The site: make -C docs html.
        "docs": [
            *FINETUNE,
            "equinox>=0.13",  # a tutorial has a model of it
            "furo>=2025.7.19",
            "jupytext>=1.17",
            "latex2mathml>=3.78",
            "myst-nb>=1.3",
            "sphinx>=8.2",
            "sphinx-copybutton>=0.5.2",
            "sphinx-design>=0.6.1",
        ],
        # The reference that tests compare with. PyPI's torch for Linux brings CUDA libraries; the CPU build
        # is smaller: add --extra-index-url https://download.pytorch.org/whl/cpu
        "oracle": ["torch==2.13.0"],
        # Other implementations that experiments/benchmarks/step/main.py compares with.
        "peers": ["jax-privacy==2.0.0"],
        "peers-torch": ["opacus==1.6.0", "torch==2.13.0"],
        "cuda": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
