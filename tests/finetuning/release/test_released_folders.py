"""What is in `model/` and `adapter/`: enough to use and to trust the model, and nothing private."""

from __future__ import annotations

import getpass
import json
import random
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import pytest
import transformers
import vllm_rules
from huggingface_hub import ModelCard, metadata_load
from seed_spellings import holders
from small_tables import GREEDY, WORDS, rows, write_e2e

from dp_rmt.data import tokenize_prompts
from dp_rmt.finetuning import arms
from dp_rmt.finetuning.door import load_finetuned
from dp_rmt.finetuning.release.card import public_scores
from dp_rmt.finetuning.settings import Settings
from dp_rmt.reporting.privacy_statement import PrivacyStatement, read_privacy
from dp_rmt.reporting.privacy_text import RELEASE, sections
from dp_rmt.training.ledger import read_ledger
from dp_rmt.training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("no_java")
SEEDS = [random.Random(22).getrandbits(127) | 1 << 127 for _ in range(2)]
BASE_CARD = "---\nlicense: apache-2.0\nlanguage: en\ntags:\n- private_tag\n---\n# Somebody's model\n"


@pytest.fixture(scope="module")
def config(make_config: Callable[..., Settings], make_llama: Callable[..., Path], tmp_path_factory) -> Settings:
    folder = tmp_path_factory.mktemp("unmistakable_folder")
    data = folder / "unmistakable_data"
    write_e2e(data)
    model = make_llama(folder / "bases", WORDS, max_length=64)
    (model / "README.md").write_text(BASE_CARD)
    changes = {
        **GREEDY,
        "name": "unmistakable_name",
        "data.path": str(data),
        "model": {"path": str(model), "tuning": "lora"},
        "privacy": {"sampling_seed": SEEDS[0], "noise_seed": SEEDS[1]},
        "train.learning_rate": 0.05,
        "generation.no_repeat_ngram_size": 1,  # so that a random model writes other texts for other sources
    }
    return make_config(changes)


@pytest.fixture(scope="module")
def arm(config: Settings, tmp_path_factory: pytest.TempPathFactory) -> arms.Arm:
    """A run of three steps on private tables, whose folder has `model/` and `adapter/`."""
    (arm,) = arms.prepare(config, tmp_path_factory.mktemp("unmistakable_workdir") / "run")
    arms.train(arm)
    return arm


def released(arm: arms.Arm) -> list[Path]:
    return [path for kind in ("model", "adapter") for path in sorted((arm.workdir / kind).rglob("*")) if path.is_file()]


def private_traces(arm: arms.Arm) -> Iterator[str]:
    """What must not leave with a model: places, names and users of this machine, private texts, and private scores."""
    settings = arm.settings
    yield from (str(arm.workdir), str(settings.data.path), str(settings.data.cache_dir), str(settings.model.path))
    yield from ("unmistakable", "/tmp", "private_tag", socket.gethostname(), f"/{getpass.getuser()}/", str(Path.home()))
    yield from (text for row in rows(120, len("trainset")) for text in row)
    for line in read_metrics(arm.workdir / "metrics.jsonl"):
        for name, value in line.items():
            if name.startswith(("eval/", "nonprivate/")) and isinstance(value, float) and value not in (0.0, 1.0):
                yield from (repr(value), f"{value:.4f}", f"{value:.6f}")


def test_nothing_private_leaves_with_the_model(arm: arms.Arm) -> None:
    traces = set(private_traces(arm))
    assert len(traces) > 40
    metrics = (arm.workdir / "metrics.jsonl").read_text()
    assert any(trace in metrics for trace in traces)  # the numbers are looked for as they are written
    paths = released(arm)
    assert {path.name for path in paths} >= {"README.md", "tokenizer_config.json", "generation_config.json"}
    for path in paths:
        content = path.read_bytes()
        # Two or three letters, such as a short host name, stand among the bytes of some weights by chance.
        shortest = 5 if path.suffix == ".safetensors" else 1
        assert [trace for trace in traces if len(trace) >= shortest and trace.encode() in content] == [], path
    for kind in ("model", "adapter"):
        assert holders(arm.workdir / kind, SEEDS) == set()
    assert holders(arm.workdir, SEEDS) >= {"config.json"}


def test_the_card_has_the_hubs_header_and_the_statements_words(arm: arms.Arm) -> None:
    statement = PrivacyStatement.from_json(read_privacy(arm.workdir))
    for kind, library in (("model", "transformers"), ("adapter", "peft")):
        path = arm.workdir / kind / "README.md"
        assert metadata_load(path) == {
            "language": ["en"],
            "library_name": library,
            "license": "apache-2.0",
            "pipeline_tag": "text-generation",
            "tags": ["dp_rmt", "differential-privacy", "dp-sgd"],
        }
        text = ModelCard.load(path).text
        assert "**ε = 0.5 at δ = 0.001**. The unit is one training example (add or remove one)" in text
        assert "the sampler Poisson, the accountant privacy loss distributions" in text
        for heading, paragraphs in sections(statement):
            if heading not in (RELEASE, "What this is about"):
                assert all(f"- {paragraph}" in text for paragraph in paragraphs), heading
        assert "They were given in the config" in text
        assert "checkpoints" not in text
        assert "`'[CLS]SOURCE[CLS]'`" in text
        assert "--train=DATA --epsilon=0.5" in text
    assert 'base_model_name_or_path": "model"' in (arm.workdir / "adapter" / "adapter_config.json").read_text()


def test_the_saved_tokenizer_writes_the_prompts_of_the_training(arm: arms.Arm) -> None:
    """By what vLLM and transformers read: the ids of the template, the end tokens, and the longest context."""
    sources = arm.task.prompts.sources
    expected = tokenize_prompts(sources, arm.task.tokenizer, max_length=64)
    for kind in ("model", "adapter"):
        folder = arm.workdir / kind
        assert "chat_template" in json.loads((folder / "tokenizer_config.json").read_text())
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        chats = [[{"role": "user", "content": source}] for source in sources]
        assert tokenizer.apply_chat_template(chats, add_generation_prompt=True)["input_ids"] == expected
        assert tokenizer.model_max_length == arm.task.module.config.max_position_embeddings == 64
        generation = transformers.GenerationConfig.from_pretrained(folder)
        assert generation.eos_token_id == arm.task.tokenizer.eos_token_id
        assert (generation.do_sample, generation.max_new_tokens) == (False, 12)


def test_versions_of_transformers_before_5_know_the_tokenizers_class(arm: arms.Arm) -> None:
    config = json.loads((arm.workdir / "model" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] in ("PreTrainedTokenizerFast", "BertTokenizer")


def test_vllm_finds_a_place_for_every_tensor(arm: arms.Arm) -> None:
    model, adapter = arm.workdir / "model", arm.workdir / "adapter"
    config = json.loads((model / "config.json").read_text())
    assert vllm_rules.loaded(model) == vllm_rules.parameters(config)
    assert config["max_position_embeddings"] == 64
    assert vllm_rules.default_sampling(model) == {"max_new_tokens": 12}
    targets = {f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qv"}
    assert vllm_rules.adapted_modules(adapter) == targets
    assert not {path.suffix for path in released(arm)} & {".bin", ".pt", ".pth", ".gguf"}  # read in safetensors' place


LINES: list[dict[str, Any]] = [
    {"step": 0, "eval/dev/loss": 2.5, "nonprivate/loss": 3.0},
    {"step": 3, "eval/dev/loss": 1.5, "eval/test/bleu": 0.25, "epsilon": 1.0},
]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data.path": "somewhere"}, {}),
        ({"data.path": "somewhere", "release.public_evaluations": ("test",)}, {"test/bleu": 0.25}),
        ({"data.path": None}, {"dev/loss": 1.5, "test/bleu": 0.25}),
        ({"data.path": "somewhere", "synthetic": {}}, {"dev/loss": 1.5, "test/bleu": 0.25}),
    ],
)
def test_scores_of_private_data_are_private(changes: Mapping[str, Any], expected: dict[str, float]) -> None:
    assert public_scores(Settings().changed({"data.task": "e2e", **changes}), LINES) == expected


# ---- In plain transformers ------------------------------------------------------------------------------------------


def texts_of(workdir: Path) -> dict[str, str]:
    """Source -> the text that `generate` has written here."""
    lines = [json.loads(line) for line in (workdir / "texts.jsonl").read_text().splitlines()]
    return {line["source"]: line["text"] for line in lines}


@pytest.mark.oracle
@pytest.mark.thorough
@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_a_plain_pipeline_writes_the_texts_that_were_written_here(method: str, arm: arms.Arm, tmp_path: Path) -> None:
    """With beams, after the same command with another way of generating, which trains nothing and writes anew."""
    pytest.importorskip("torch")
    workdir = tmp_path / "run"
    shutil.copytree(arm.workdir, workdir)
    if method == "beam":
        beams = {"generation.method": "beam", "generation.num_beams": 3, "generation.max_new_tokens": 9}
        (other,) = arms.prepare(arm.settings.changed(beams), workdir)
        arms.train(other)
        assert texts_of(workdir) != texts_of(arm.workdir)
        assert read_ledger(workdir)[-1].updates == read_ledger(arm.workdir)[-1].updates == 3
    expected = texts_of(workdir)
    assert len(set(expected.values())) > 1
    pipe = transformers.pipeline("text-generation", model=str(workdir / "model"))
    for source, text in expected.items():
        answer = pipe([{"role": "user", "content": source}])[0]["generated_text"][-1]
        assert answer["content"].strip() == text


@pytest.mark.oracle
@pytest.mark.thorough
def test_a_plain_pipeline_gives_the_classes_and_cuts_as_here(
    make_config: Callable[..., Settings], tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    (one,) = arms.prepare(make_config({"train.learning_rate": 0.02, "data.max_length": 9}), tmp_path / "run")
    arms.train(one)
    texts = [" ".join(["a fine film", "a bad film", "the plot is dull"][n % 3 :: 2] * n) for n in range(1, 9)]
    texts += ["the film was great", "it was terrible and the plot was dull and too long to watch at all"]
    model = load_finetuned(tmp_path / "run")
    pipe = transformers.pipeline("text-classification", model=str(tmp_path / "run" / "model"))
    probabilities = jax.nn.softmax(model.logits(texts), axis=1)
    for found, name, row in zip(pipe(texts, truncation=True), model.predict(texts), probabilities, strict=True):
        assert found["label"] == name
        assert found["score"] == pytest.approx(float(row.max()), abs=1e-5)
    assert "Training and scores cut texts at 9 tokens" in (tmp_path / "run" / "model" / "README.md").read_text()
