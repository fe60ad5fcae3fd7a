"""Every option of the program, with its type, its doc and its check. `configs.base` is made from these."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from dp_rmt.finetuning.data_settings import Data
from dp_rmt.finetuning.options import NOT_NEGATIVE, POSITIVE, Check, Group, group, option, replaced

Named = str | tuple[str, Mapping[str, Any]]
"""A function of the library by its name, alone or with options; see `dp_rmt.finetuning.transforms`."""

FRACTION = Check("be at least 0 and below 1", lambda x: 0 <= x < 1)
DELTA = Check("be above 0 and below 1", lambda x: 0 < x < 1, "; leave it out for N^-1.1")
# `jax.random.key` keeps 32 bits of a seed, so that of longer ones two could be the same.
PUBLIC_SEED = Check("be in [0, 2^32)", lambda seed: 0 <= seed < 2**32)
SECRET_SEED = Check("be in [0, 2^128)", lambda seed: 0 <= seed < 2**128)


@dataclasses.dataclass(frozen=True)
class LoRA(Group):
    """Low-rank updates, for model.tuning "lora" and "ffa_lora"."""

    WHERE: ClassVar[str] = "config.model.lora"
    rank: int = option(8, "Rank of each update.", POSITIVE)
    alpha: float = option(16.0, "An update is multiplied by alpha / rank.", POSITIVE)
    targets: tuple[str, ...] = option(("query", "value"), "The projections that get an update.")


@dataclasses.dataclass(frozen=True)
class Model(Group):
    """What is fine-tuned."""

    WHERE: ClassVar[str] = "config.model"
    path: str = option("roberta-base", "Folder, name on the hub, or package:NAME/FOLDER of an installed package.")
    head: Literal["classification", "infilling", "causal_lm"] = option(
        "classification",
        "What stands on top: a fresh classifier; for infilling, a prompt and label words; for text, causal_lm.",
    )
    tuning: Literal["full", "lora", "ffa_lora", "bias"] = option(
        "full", "What trains: everything, low-rank updates, their factor B alone, or the biases alone."
    )
    trainable: str = option(
        ".*",
        "Regular expression over the paths of parameters; the others are frozen, but for layers that the model's files "
        "lack, which always train. For tuning full alone.",
    )
    lora: LoRA = group(LoRA, "Low-rank updates.")
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", "Type of activations; parameters, norms and noise are always float32."
    )
    remat: bool = option(False, "Computes layers again in the backward pass: less memory, more time.")
    flash_attention: bool = option(False, "For decoders on NVIDIA GPUs, with dtype bfloat16.")


@dataclasses.dataclass(frozen=True)
class Privacy(Group):
    """The guarantee, and all that it depends on beside the number of steps."""

    WHERE: ClassVar[str] = "config.privacy"
    epsilon: float = option(8.0, "Privacy budget; inf is no noise, no clipping and no privacy.", POSITIVE)
    delta: float | None = option(None, "None: N^-1.1 for N training examples.", DELTA)
    l2_clip_norm: float = option(0.1, "Largest norm of one example's gradient.", POSITIVE)
    clip: Literal["flat", "automatic"] = option(
        "flat", "Whether long gradients are shortened (flat), or all are normalised (automatic)."
    )
    clip_quantile: float | None = option(
        None,
        "Lets the clip norm, from l2_clip_norm on, follow this quantile of the gradients' norms, privately; None keeps "
        "it. Updates are then in units of the clip norm.",
        Check("be above 0 and below 1", lambda q: 0 < q < 1, "; None for a fixed clip norm"),
    )
    clip_quantile_share: float = option(
        0.01,
        "The share of the budget that following a quantile takes.",
        Check("be above 0 and below 1", lambda s: 0 < s < 1),
    )
    clip_quantile_rate: float = option(0.2, "How fast the clip norm follows, as the exponent of a step.", POSITIVE)
    noise_bands: int = option(
        1,
        "Correlates the noise of so many steps (BandMF), so that much of it cancels over the run; as many groups of "
        "examples then take turns. 1: independent noise, DP-SGD. `experiments.noise_bands` says which number is best.",
        POSITIVE,
    )
    accountant: Literal["pld", "rdp"] = option("pld", "Privacy loss distributions, or Rényi divergences.")
    expected_batch_size: int | None = option(
        None,
        "Mean size of a Poisson sample. None: a tenth of the training examples as a power of two, at most 1000.",
        POSITIVE,
    )
    max_batch_size: int | None = option(
        None, "Rows of a batch; larger samples are cut, which is accounted for. None: mean + 5 sd.", POSITIVE
    )
    rows_per_user: int = option(
        4, "With data.user_column: the most rows of a person in one step, whose mean gradient is clipped.", POSITIVE
    )
    evaluation_epsilon: float | None = option(
        None,
        "Privacy budget of each row of the evaluation data, for all scores of the run together: accuracies then have "
        "noise, and nothing else is reported. None: the evaluation data is public.",
        POSITIVE,
    )
    sampling_seed: int | None = option(
        None, "Of the samples; None takes the operating system's entropy, as private data needs.", SECRET_SEED
    )
    noise_seed: int | None = option(
        None, "Of the noise; None takes the operating system's entropy, as private data needs.", SECRET_SEED
    )
    noise_generator: Literal["threefry2x32", "chacha20"] = option(
        "threefry2x32",
        "What the noise's bits come from: JAX's own generator, or a cipher, whose noise takes several times as long.",
    )
    nonprivate_metrics: bool = option(
        True, "Also logs nonprivate/..., which are raw values: then keep the logs to yourself."
    )


@dataclasses.dataclass(frozen=True)
class Train(Group):
    """The course of a run."""

    WHERE: ClassVar[str] = "config.train"
    epochs: float | None = option(None, "Length of the run; None, and no num_steps either: 3 epochs.", POSITIVE)
    num_steps: int | None = option(None, "Length of the run in updates, in the place of epochs.", POSITIVE)
    learning_rate: float = option(5e-4, "Largest learning rate, of whichever optimizer.", POSITIVE)
    schedule: Literal["linear", "constant"] = option("linear", "After the warm-up: linear goes to zero over the run.")
    warmup_steps: int = option(0, "Updates in which the learning rate rises linearly.", NOT_NEGATIVE)
    average_iterates: float | None = option(
        None,
        "Decay of the exponential average of the iterates, which is then evaluated and saved; None: the last iterate.",
        FRACTION,
    )
    clipping_method: Literal["auto", "bookkeeping", "ghost", "vmap"] = option(
        "auto", "How per-example norms are computed; vmap takes layers without a rule. The result is the same."
    )
    microbatch_size: Literal["auto"] | int = option(
        "auto",
        "Examples differentiated at once; auto: as many as fit into the memory.",
        Check("be above 0, or 'auto'", lambda size: size == "auto" or size > 0),
    )
    advice: bool = option(
        True,
        "Measures what limits the run, from noisy gradients alone. Costs the memory of one more copy of the trained "
        "parameters, and about 0.1% of a step's operations.",
    )
    eval_every: int = option(20, "Updates between evaluations.", POSITIVE)
    eval_batch_size: int = option(128, "Rows evaluated at once.", POSITIVE)
    checkpoint_every: int = option(50, "Updates between checkpoints.", POSITIVE)


@dataclasses.dataclass(frozen=True)
class Whitening(Group):
    """The coordinates in which a layer's inputs are nearly white, found on public rows before training."""

    WHERE: ClassVar[str] = "config.whitening"
    where: Literal["nowhere", "before_clipping", "before_optimizer", "after_optimizer"] = option(
        "nowhere",
        "What is mapped. before_clipping: gradients are clipped, noised, denoised and given to the optimizer in these "
        "coordinates; before_optimizer: the noisy gradient; after_optimizer: the update.",
    )
    sides: Literal["inputs", "both"] = option("inputs", "Whitens inputs alone, or output gradients, too.")
    ridge: float = option(0.1, "Added to the eigenvalues, in units of their mean.", POSITIVE)
    power: float = option(
        -0.5,
        "Of the eigenvalues; 0 leaves all as it is.",
        Check("be at least -2 and at most 0", lambda p: -2 <= p <= 0),
    )
    rank: int | None = option(
        128, "Directions of each side that have a factor of their own; None: all. Few save memory and time.", POSITIVE
    )
    rows: int = option(500, "Public rows that the second moments are taken from.", POSITIVE)
    text: str | None = option(
        None, "A file of PUBLIC text, one text a line, to take the rows from; None takes random tokens."
    )


@dataclasses.dataclass(frozen=True)
class Mesh(Group):
    """How devices share the work (-1: those that are left). A run can go on with another mesh."""

    WHERE: ClassVar[str] = "config.mesh"
    data: int = option(-1, "Devices with other examples and a copy of the parameters.")
    fsdp: int = option(1, "Devices with other examples and a part of parameters and optimizer state.")
    tensor: int = option(1, "Devices with the same examples and a part of each layer.")


@dataclasses.dataclass(frozen=True)
class Checkpoints(Group):
    """Which checkpoints are kept. A run can go on with others."""

    WHERE: ClassVar[str] = "config.checkpoints"
    keep: int = option(2, "How many of the newest checkpoints are kept.")
    keep_best: int = option(0, "How many of the best are kept, too; a checkpoint has a score if its step is evaluated.")
    score: str | None = option(None, "The score that decides which are the best, such as eval/dev/accuracy.")
    best_is: Literal["max", "min"] = option("max", "Whether more or less of the score is better.")


@dataclasses.dataclass(frozen=True)
class Writers(Group):
    """Who gets the metrics beside metrics.jsonl. A run can go on with others."""

    WHERE: ClassVar[str] = "config.writers"
    to: tuple[Literal["csv", "tensorboard", "wandb"], ...] = option(
        (), "Files and services: metrics.csv, the folder tensorboard, Weights & Biases; the last two are extras."
    )
    nonprivate: bool = option(False, "Whether they get nonprivate/..., too, which are raw values.")
    wandb_project: str = option("dp_rmt", "Project of Weights & Biases.")
    wandb_online: bool = option(True, "False: only writes the folder wandb, which `wandb sync` sends later.")


@dataclasses.dataclass(frozen=True)
class Generation(Group):
    """How a trained decoder writes a text for each row of a split, which is then scored."""

    WHERE: ClassVar[str] = "config.generation"
    split: Literal["dev", "test"] = option("test", "The split whose sources are written about.")
    max_prompts: int | None = option(None, "At most so many rows, evenly spaced; None: all.", POSITIVE)
    method: Literal["greedy", "beam", "sampling"] = option("beam", "How the next token is chosen.")
    max_new_tokens: int = option(100, "Longest text in tokens.")
    no_repeat_ngram_size: int = option(0, "No sequence of this many tokens comes twice; 0: any may.")
    num_beams: int = option(5, "For beam.")
    length_penalty: float = option(1.0, "For beam: more favours longer texts.")
    seed: int = option(0, "For sampling.", PUBLIC_SEED)
    temperature: float = option(1.0, "For sampling.")
    top_k: int = option(0, "For sampling: from the k likeliest tokens; 0: from all.")
    top_p: float = option(1.0, "For sampling: from the likeliest tokens of this probability together.")
    batch_size: int = option(32, "Texts written at once.", POSITIVE)
    prompt_lengths: tuple[int, ...] = option(
        (32, 64, 96, 128), "Lengths in tokens that prompts are padded to, beside the longest."
    )


@dataclasses.dataclass(frozen=True)
class Release(Group):
    """What the model's card says and no file here can tell; all of it is published. A run can go on with another."""

    WHERE: ClassVar[str] = "config.release"
    base_model: str | None = option(
        None, "Public name of the pre-trained model; None: its name on the hub, or the last part of its folder's path."
    )
    license: str | None = option(
        None, "Licence, in the hub's letters, such as apache-2.0; None: that of the pre-trained model's own card."
    )
    language: tuple[str, ...] = option((), "Codes such as en; empty: those of the pre-trained model's own card.")
    data_name: str | None = option(None, "Public name of the data; None: that of data from the hub.")
    public_evaluations: tuple[str, ...] = option(
        (), "Names of evaluation data that are public, such as dev. Scores on others are private, but for the hub's."
    )


@dataclasses.dataclass(frozen=True)
class Synthetic(Group):
    """The project's own reviews, and a small encoder that is pre-trained on their public part."""

    WHERE: ClassVar[str] = "config.synthetic"
    num_public: int = option(2_000, "Public reviews, for pre-training.", POSITIVE)
    num_private_train: int = option(20_000, "Private reviews to train on.", POSITIVE)
    num_private_dev: int = option(1_000, "Private reviews to evaluate on.", POSITIVE)
    hidden_size: int = option(64, "Width of the encoder.", POSITIVE)
    num_layers: int = option(2, "Layers of the encoder.", POSITIVE)
    num_heads: int = option(4, "Attention heads of the encoder.", POSITIVE)
    num_steps: int = option(70, "Updates of pre-training.", POSITIVE)
    batch_size: int = option(64, "Reviews in an update of pre-training.", POSITIVE)
    learning_rate: float = option(1e-3, "Learning rate of pre-training.", POSITIVE)


@dataclasses.dataclass(frozen=True)
class Settings(Group):
    """An experiment; without arms a single run.

    Raises:
      ValueError: a value is not of its type or out of its range; the message names the option.

    >>> Settings.from_config({"privacy": {"epsilon": 3}}).privacy.epsilon
    3.0
    """

    name: str = option("base", "Name of the experiment.")
    seed: int = option(0, "Of public randomness, such as a fresh classification head.", PUBLIC_SEED)
    data: Data = group(Data, "What is trained on.")
    model: Model = group(Model, "What is fine-tuned.")
    privacy: Privacy = group(Privacy, "The guarantee.")
    denoise: tuple[Named, ...] = option(
        (("denoise_matrices", {"shrinker": "frobenius", "gate": ("kappa", {"kappa": 1.0}), "svd": "subspace"}),),
        "What a noisy gradient passes before the optimizer, each stage a name or (name, options): denoise_matrices, "
        "low_pass_filter, truncate_rank. () is nothing.",
    )
    optimizer: Named = option(
        ("adamw", {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0}),
        "A name or (name, options): adamw, muon, kalman_filter; denoised_adam, adam_bc, muon_bc (then denoise is ()).",
    )
    train: Train = group(Train, "The course of a run.")
    whitening: Whitening = group(Whitening, "The coordinates of gradients and updates.")
    mesh: Mesh = group(Mesh, "How devices share the work.")
    checkpoints: Checkpoints = group(Checkpoints, "Which checkpoints are kept.")
    writers: Writers = group(Writers, "Who gets the metrics beside metrics.jsonl.")
    generation: Generation = group(Generation, "How a trained decoder writes.")
    release: Release = group(Release, "What the model's card says.")
    synthetic: Synthetic | None = dataclasses.field(
        default=None, metadata={"doc": "The project's own text and encoder; None: real data.", "check": None}
    )
    arms: Mapping[str, Any] = option(
        {}, "Runs to compare: name -> the keys that differ, such as {'noisy': {'denoise': ()}}. Empty: one run."
    )

    @classmethod
    def from_config(cls, config: Any) -> Settings:
        """The settings in nested dictionaries, such as a ConfigDict or a workdir's JSON; others have their default.

        Args:
          config: nested dictionaries by name; anything that has ``items``.

        Returns:
          The settings.

        Raises:
          ValueError: there is no such option, or its value cannot be used; the message names it.
        """
        return replaced(cls(), config)

    def changed(self, changes: Mapping[str, Any]) -> Settings:
        """These settings with some options changed.

        Args:
          changes: new values by name, nested or dotted.

        Raises:
          ValueError: there is no such option, or its value cannot be used; the message names it.

        >>> Settings().changed({"privacy.epsilon": 3, "train": {"num_steps": 10}}).train.num_steps
        10
        """
        return replaced(self, changes)
