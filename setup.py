"""Packaging of dp_rmt. The tools (ruff, mypy, pytest) are configured in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"

setup(
    name="dp_rmt",
    version="0.1.0",
    description="Differentially private fine-tuning of language models with random-matrix denoising",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # Only the library is installed. `experiments` and `configs` are run from the root of a checkout
    # (`python -m experiments.finetune`): such common top-level names do not belong into site-packages.
    packages=find_packages(include=["dp_rmt", "dp_rmt.*"]),
    package_data={"dp_rmt": ["py.typed"]},
    install_requires=[
        "absl-py>=2.1",
        "datasets>=4.0",
        "dp-accounting>=0.6",  # the first with truncated Poisson sampling
        "flax>=0.12",
        "huggingface_hub>=1.0",
        "jax>=0.10",
        "jaxlib>=0.10",
        "matplotlib>=3.9",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.11.30",
        "sacrebleu>=2.5",
        "safetensors>=0.6",
        "scipy>=1.14",
        "tokenizers>=0.22",
        "tqdm>=4.66",
        "transformers>=5.0",
    ],
    extras_require={
        "test": ["hypothesis>=6.100", "mypy>=1.15", "pytest>=8.4", "ruff>=0.12"],
        # The reference that tests compare with. PyPI's torch for Linux brings CUDA libraries; the CPU build
        # is smaller: add --extra-index-url https://download.pytorch.org/whl/cpu
        "oracle": ["torch==2.13.0"],
        # Other implementations that experiments/benchmarks/step/main.py compares with.
        "peers": ["jax-privacy==2.0.0"],
        "peers-torch": ["opacus==1.6.0", "torch==2.13.0"],
        # METEOR and the official tokenizer of ROUGE-L and CIDEr; needs Java, too.
        "meteor": ["pycocoevalcap>=1.2"],
        "presidio": ["presidio-analyzer>=2.2"],  # data.sensitive="presidio"; needs a spaCy model, too
        "slurm": ["submitit>=1.5"],  # experiments/sweep.py --executor=submitit
        "cuda": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
