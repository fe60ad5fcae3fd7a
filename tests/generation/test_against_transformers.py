"""The same tokens and scores as torch transformers, on random Llamas and on a real one."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dp_rmt.generation import Beam, Greedy, Method, generate
from dp_rmt.models import load_pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.oracle, pytest.mark.thorough]


@pytest.fixture(scope="module")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Theirs, and ours; so many words only that rows end by chance."""
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        attention_bias=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(folder)
    return theirs, *load_pretrained(folder, head="causal_lm")


@functools.cache
def stories() -> Any:
    shared = os.environ.get("DP_RMT_SHARED")
    folder = Path(shared or "") / "models" / "stories260K" / "hf"
    if not shared or not folder.is_dir():
        pytest.skip("DP_RMT_SHARED does not name a folder that holds models/stories260K/hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    return tokenizer, theirs, *load_pretrained(folder, head="causal_lm")


def prompts(vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    ids = rng.integers(3, vocab_size, (6, 8))
    mask = (np.arange(8) >= np.array([0, 3, 5, 0, 1, 4])[:, None]).astype(np.int64)
    return ids * mask, mask


def compare(theirs: Any, module: Any, params: Any, ids: Any, mask: Any, method: Method) -> np.ndarray:
    """Compares tokens and scores; returns the lengths."""
    ours = generate(module, params, ids, mask, method)
    options: dict[str, Any] = {"num_beams": 1}
    if isinstance(method, Beam):
        names = ("num_beams", "length_penalty", "early_stopping")
        options = {name: getattr(method, name) for name in names}
    expected = theirs.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        do_sample=False,
        max_new_tokens=method.max_new_tokens,
        eos_token_id=list(method.end_tokens),
        pad_token_id=method.fill_token,
        no_repeat_ngram_size=method.no_repeat_ngram_size,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    tokens = expected.sequences.numpy()[:, ids.shape[1] :]
    np.testing.assert_array_equal(np.asarray(ours.tokens_BxT)[:, : tokens.shape[1]], tokens)
    assert (np.asarray(ours.tokens_BxT)[:, tokens.shape[1] :] == method.fill_token).all()
    if isinstance(method, Beam):
        expected_scores = expected.sequences_scores.numpy()
        np.testing.assert_allclose(ours.normalised_scores_B, expected_scores, rtol=1e-5, atol=1e-4)
    return np.asarray(ours.lengths_B)


@pytest.mark.parametrize("ngrams", [0, 3])
def test_greedy(random_llama: Any, ngrams: int) -> None:
    theirs, module, params = random_llama
    sizes: Any = {"max_new_tokens": 24, "no_repeat_ngram_size": ngrams}
    lengths = compare(theirs, module, params, *prompts(32), Greedy(**sizes, eos_token_id=(12, 24), pad_token_id=1))
    assert lengths.min() < 24


@pytest.mark.parametrize(
    ("length_penalty", "early_stopping", "ngrams", "ends"),
    [
        (-1.0, "never", 0, 12),
        (0.8, True, 4, (12, 24)),
        (0.0, False, 3, (2, 9)),
        (2.0, False, 0, (2, 9, 14)),
        (2.0, "never", 2, (12, 24)),
    ],
)
def test_beams(random_llama: Any, length_penalty: float, early_stopping: Any, ngrams: int, ends: Any) -> None:
    theirs, module, params = random_llama
    method = Beam(
        max_new_tokens=20,
        eos_token_id=ends,
        pad_token_id=1,
        no_repeat_ngram_size=ngrams,
        num_beams=4,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    compare(theirs, module, params, *prompts(32), method)


def test_the_real_llama_tells_the_same_story() -> None:
    """199 tokens after the begin of a text; the tokens of `run.c -t 0` on the same checkpoint begin so, too."""
    tokenizer, theirs, module, params = stories()
    ids = np.array([[tokenizer.bos_token_id]])
    method = Greedy(max_new_tokens=199, eos_token_id=tokenizer.eos_token_id)
    assert compare(theirs, module, params, ids, np.ones_like(ids), method).tolist() == [199]
    text = tokenizer.decode(np.asarray(generate(module, params, ids, np.ones_like(ids), method).tokens_BxT)[0])
    assert text.startswith("Once upon a time, there was a little girl named Lily. She loved to play outside in the ")


@pytest.mark.parametrize(("length_penalty", "ngrams"), [(0.8, 4), (2.0, 0)])
def test_the_real_llama_with_beams(length_penalty: float, ngrams: int) -> None:
    """A full stop ends the row: the checkpoint ends stories later than a test should take."""
    tokenizer, theirs, module, params = stories()
    batch = tokenizer(["Once upon a time", "Lily and Ben", "The dog was big and it"], return_tensors="np", padding=True)
    method = Beam(
        max_new_tokens=40,
        eos_token_id=(tokenizer.eos_token_id, tokenizer.encode("a.")[-1]),
        num_beams=4,
        length_penalty=length_penalty,
        no_repeat_ngram_size=ngrams,
    )
    lengths = compare(theirs, module, params, batch["input_ids"], batch["attention_mask"], method)
    assert lengths.min() < 40
