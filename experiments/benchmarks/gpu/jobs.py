"""What is run on a GPU, the most telling first, and the same with tiny sizes for a rehearsal on the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

PARTS: Mapping[str, str] = {
    "a": "correctness",
    "b": "step",
    "c": "denoiser",
    "d": "update_rules",
    "e": "decoder",
}
"""The name of each part's file is ``LETTER_NAME.json``."""

RECORDS, WORK = "{records}", "{work}"
"""Stand in a command for the folder of the job's records, and for a folder that it may leave things in."""


@dataclasses.dataclass(frozen=True)
class Job:
    """Commands that belong together, each a process of its own, which write JSON files into one folder.

    Attributes:
      name: letter of the part, a slash and a name.
      commands: arguments of Python.
      packages: modules that must be there, else the job is skipped.
      needs: folders that must be there, likewise.
      goes_on: a second call goes on inside the job, where the first one stopped.
      variables: of the environment.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    packages: tuple[str, ...] = ()
    needs: tuple[Path, ...] = ()
    goes_on: bool = False
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def part(self) -> str:
        """Its letter."""
        return self.name.partition("/")[0]


@dataclasses.dataclass(frozen=True)
class Places:
    """Where models and data lie.

    Attributes:
      models: has ``minilm`` and the folder of the decoder.
      data: has ``sst2`` and ``e2e``, and ``tokens`` if the bundle has tokenised data.
      decoder: folder of the decoder in ``models``.
    """

    models: Path
    data: Path
    decoder: str

    def tokens(self) -> str:
        """Where tokenised data is looked for, and kept."""
        packed = self.data / "tokens"
        return str(packed) if packed.is_dir() else f"{WORK}/tokens"


def all_jobs(places: Places, *, rehearse: bool) -> list[Job]:
    """The jobs of all parts, in order."""
    if rehearse:
        return [*_correctness(rehearse=True), *_small_steps(), *_small_studies(places)]
    return [*_correctness(rehearse=False), *_steps(), *_denoisers(), *_update_rules(places), *_decoder(places)]


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return ("-m", f"experiments.{name}", *arguments)


LAWS = ("sensitivity", "noise_law", "noise_tails", "private_step")


def _correctness(*, rehearse: bool) -> Iterator[Job]:
    size = ["--model=tiny_llama", "--batch_size=4", "--sequence_length=8"] if rehearse else []
    yield Job("a/against_cpu", (_module("benchmarks.gpu.against_cpu", f"--results={RECORDS}", *size),))
    chosen = "function_of_key_step_and_leaf or bound_is_reached or padding_reaches_nothing" if rehearse else ""
    yield Job(
        "a/laws",
        (_module("benchmarks.gpu.laws", f"--results={RECORDS}", f"--chosen={chosen}", f"--laws={','.join(LAWS)}"),),
        packages=("pytest", "hypothesis", "xdist"),
        # The laws are those of the arithmetic of float32, not of TF32.
        variables={"JAX_DEFAULT_MATMUL_PRECISION": "highest"},
    )


def _step(name: str, *arguments: str, packages: tuple[str, ...] = ()) -> Job:
    command = _module("benchmarks.step.main", f"--results={RECORDS}", *arguments)
    return Job(f"b/{name}", (command,), packages=packages)


def _profile(name: str, *arguments: str) -> Job:
    """Where the time of a plain, a clipped and a whole private step goes."""
    return Job(f"b/{name}_profile", (_module("benchmarks.step.profile", f"--results={RECORDS}", *arguments),))


def _with_peers(name: str, *arguments: str) -> Iterator[Job]:
    """The same shapes in peers, each beside the plain gradient and in a process of its own."""
    yield _step(f"{name}_optax", *arguments, "--arms=optax")
    yield _step(f"{name}_jax_privacy", *arguments, "--arms=jax_privacy", packages=("jax_privacy",))


def _steps() -> Iterator[Job]:
    own = "--arms=bookkeeping,ghost,vmap"
    fast = "--arms=bookkeeping,ghost"

    def encoder(model: str, batch_size: int, *more: str) -> tuple[str, ...]:
        sizes = (f"--batch_size={batch_size}", "--sequence_length=128", "--microbatch_sizes=16,64")
        return (f"--model={model}", "--dtype=bfloat16", *sizes, "--repeats=10", *more)

    def decoder(model: str, batch_size: int, *more: str) -> tuple[str, ...]:
        sizes = (f"--batch_size={batch_size}", "--sequence_length=512", "--microbatch_sizes=2,8")
        return (f"--model={model}", "--dtype=bfloat16", *sizes, "--repeats=5", *more)

    yield _step("roberta_base_256", *encoder("roberta_base", 256, own))
    sizes = ("--batch_size=256", "--sequence_length=128", "--dtype=bfloat16")
    yield _profile("roberta_base_256", "--model=roberta_base", *sizes)
    yield _step("qwen3_4b_lora_8_flash", *decoder("qwen3_4b_lora", 8, fast, "--flash_attention"))
    yield from _with_peers("roberta_base_256", *encoder("roberta_base", 256))
    yield _step("roberta_base_256_torch", *encoder("roberta_base", 256, "--arms=plain", "--torch"), packages=("torch",))
    for model, batch_size in (("llama3_2_1b_lora", 16), ("llama3_2_1b", 8)):
        yield _step(f"{model}_{batch_size}_flash", *decoder(model, batch_size, fast, "--flash_attention"))
        yield _step(f"{model}_{batch_size}", *decoder(model, batch_size, own))
    yield from _with_peers("llama3_2_1b_lora_16", *decoder("llama3_2_1b_lora", 16))
    yield _step("qwen3_4b_lora_8", *decoder("qwen3_4b_lora", 8, fast))
    yield _step("qwen3_4b_4_flash", *decoder("qwen3_4b", 4, fast, "--flash_attention", "--remat"))
    for batch_size in (32, 64, 128, 512):
        yield _step(f"roberta_base_{batch_size}", *encoder("roberta_base", batch_size, own))
    for batch_size in (128, 32, 512):
        yield _step(f"roberta_large_{batch_size}", *encoder("roberta_large", batch_size, own))
    yield from _with_peers("roberta_large_128", *encoder("roberta_large", 128))
    torch = encoder("roberta_large", 128, "--arms=plain", "--torch")
    yield _step("roberta_large_128_torch", *torch, packages=("torch",))


def _denoisers() -> Iterator[Job]:
    for model, layers in (
        ("roberta_base", 12),
        ("minilm", 6),
        ("roberta_large", 24),
        ("llama3_2_1b", 2),  # full decompositions of all its layers would take the whole call
        ("qwen3_4b", 1),
    ):
        command = _module("benchmarks.denoiser", f"--model={model}", f"--num_layers={layers}", f"--results={RECORDS}")
        yield Job(f"c/{model}", (command,))
    for model, length, microbatch in (("roberta_base", 128, 128), ("minilm", 48, 512), ("llama3_2_1b_lora", 512, 8)):
        sizes = ("--batch_size=1024", f"--sequence_length={length}", f"--microbatch_sizes={microbatch}")
        arguments = (f"--model={model}", "--dtype=bfloat16", *sizes, "--updates=subspace,gram", "--repeats=5")
        yield Job(f"c/{model}_step", (_module("benchmarks.step.main", f"--results={RECORDS}", *arguments),))


def _study(name: str, config: str, places: Places, *arguments: str) -> Job:
    command = _module(
        "studies.methods.study",
        f"--config=configs/{config}.py",
        f"--config.data.path={places.data / 'sst2'}",
        f"--config.data.cache_dir={places.tokens()}",
        f"--config.model.path={places.models / 'minilm'}",
        f"--workdir={WORK}/runs",
        f"--results={RECORDS}",
        *arguments,
    )
    return Job(f"d/{name}", (command,), needs=(places.models / "minilm", places.data / "sst2"), goes_on=True)


def _update_rules(places: Places) -> Iterator[Job]:
    seeds = tuple(f"--seeds={seed}" for seed in range(5))
    epsilons = tuple(f"--epsilons={epsilon}" for epsilon in (3, 8, 1))
    for batch_size in (1024, 4096, 16384):
        sizes = (f"--batch_sizes={batch_size}", "--config.train.microbatch_size=512")
        for config in ("sst2_whitening", "sst2_methods"):
            yield _study(f"{config}_{batch_size}", config, places, *sizes, *epsilons, *seeds)


def _generation(name: str, places: Places, *arguments: str) -> Job:
    folder = places.models / places.decoder
    command = _module("benchmarks.generation", f"--model={folder}", f"--results={RECORDS}", *arguments)
    return Job(f"e/{name}", (command,), needs=(folder,))


def _texts(name: str, places: Places, *arguments: str) -> Job:
    """E2E from training to scored texts, and its records."""
    folder = places.models / places.decoder
    train = _module(
        "finetune",
        "--config=configs/e2e_stories260k.py",
        f"--config.data.path={places.data / 'e2e'}",
        f"--config.data.cache_dir={places.tokens()}",
        f"--config.model.path={folder}",
        f"--workdir={WORK}/runs",
        *arguments,
    )
    table = _module("studies.texts.table", f"--workdirs={WORK}/runs", f"--results={RECORDS}")
    return Job(f"e/{name}", (train, table), needs=(folder, places.data / "e2e"), goes_on=True)


def _decoder(places: Places) -> Iterator[Job]:
    for batch_size in (32, 256):
        arguments = (f"--batch_size={batch_size}", "--new_tokens=64", "--dtype=bfloat16")
        yield _generation(f"decoding_{batch_size}", places, *arguments)
    recipe = (
        "--config.privacy.expected_batch_size=1024",
        "--config.train.num_steps=411",  # ten epochs, as in configs/table_to_text.py
        "--config.train.eval_every=100",
    )
    for epsilon in (3, 8):
        options = (f"--config.privacy.epsilon={epsilon}", "--config.train.microbatch_size=256")
        yield _texts(f"e2e_epsilon_{epsilon}", places, *recipe, *options)


def _small_steps() -> Iterator[Job]:
    sizes = ("--batch_size=4", "--sequence_length=8", "--num_layers=1", "--microbatch_sizes=2", "--repeats=2")
    arms = ("--arms=bookkeeping,vmap", "--dtype=bfloat16")
    yield _step("tiny_llama_lora", "--model=tiny_llama_lora", *sizes, *arms)
    yield _profile("tiny", "--model=tiny", "--batch_size=4", "--sequence_length=8", "--num_layers=1", "--repeats=1")
    yield from _with_peers("tiny", "--model=tiny", *sizes)
    yield _step("tiny_torch", "--model=tiny", *sizes, "--arms=plain", "--torch", packages=("torch",))
    arguments = ("--model=tiny", "--num_layers=1", "--repeats=2", f"--results={RECORDS}")
    yield Job("c/tiny", (_module("benchmarks.denoiser", *arguments),))
    updates = ("--model=tiny", *sizes, "--updates=subspace", f"--results={RECORDS}")
    yield Job("c/tiny_step", (_module("benchmarks.step.main", *updates),))


def _small_studies(places: Places) -> Iterator[Job]:
    short = (
        "--config.data.max_train_examples=64",
        "--config.data.length_groups=()",
        "--config.train.num_steps=2",
        "--config.train.microbatch_size=8",
        "--config.privacy.accountant=rdp",  # the quicker one
    )
    study = ("--arms=dp_adam", "--batch_sizes=8", "--seeds=0", "--epsilons=8", "--selection_steps=1", "--eval_rows=8")
    head = "--config.model.trainable=classifier"  # the whole of MiniLM compiles for minutes
    yield _study("sst2_whitening_8", "sst2_whitening", places, *study, *short, head, "--config.data.max_length=24")
    yield _generation("decoding_2", places, "--batch_size=2", "--prompt_length=4", "--new_tokens=4", "--repeats=2")
    yield _texts(
        "e2e_epsilon_8",
        places,
        *short,
        "--config.arms={}",
        "--config.privacy.expected_batch_size=8",
        "--config.data.max_length=64",  # the whole dev set is evaluated twice
        "--config.train.eval_every=2",
        "--config.generation.max_new_tokens=4",
        "--config.generation.max_prompts=4",
        "--config.generation.batch_size=4",
    )
