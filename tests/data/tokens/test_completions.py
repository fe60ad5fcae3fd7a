"""Where the loss is, what is cut, and that a prompt has the same tokens in training and in generation."""

import copy
import json
import logging
import os
import pathlib

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dp_rmt.data import TextPairs, decode_completions, fingerprint, tokenize_completions, tokenize_prompts
from dp_rmt.data.prompt_format import prompt_format_of

PAIRS = TextPairs(("a b", "c d e f g h", "film"), ("the soup was great", "yes", "no ."))


@pytest.fixture(scope="session")
def words(word_tokenizer):
    """Like Llama's: BOS at the beginning, words that carry their own mark; and no pad token."""
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "[CLS]", "[SEP]", None
    return tokenizer


@pytest.fixture(scope="session")
def gpt2_like():
    """Byte-level BPE with spaces in the tokens, one token for all special purposes, no BOS put at the beginning."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["a pub the pub a a the soup was great"] * 9, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


@pytest.fixture(scope="session")
def llama():
    """The real one of stories260K."""
    shared = os.environ.get("DP_RMT_SHARED")
    folder = pathlib.Path(shared or "") / "models" / "stories260K" / "hf"
    if not shared or not folder.is_dir():
        pytest.skip("DP_RMT_SHARED does not name a folder that holds models/stories260K/hf")
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def tokens(tokenizer, ids):
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


def test_layout_of_words(words, caplog):
    with caplog.at_level(logging.INFO, "absl"):
        arrays = tokenize_completions(PAIRS, words, max_length=9)
    assert list(arrays) == ["input_ids", "attention_mask", "loss_mask"]
    assert {(array.shape, array.dtype.name) for array in arrays.values()} == {((3, 9), "int32")}
    assert [tokens(words, ids) for ids in arrays["input_ids"]] == [
        "[CLS] a b [CLS] the soup was great [SEP]",
        "[CLS] c d e f g [CLS] yes [SEP]",  # the source lost its end
        "[CLS] film [CLS] no . [SEP] [SEP] [SEP] [SEP]",  # EOS pads where there is no pad token
    ]
    assert arrays["attention_mask"].sum(axis=1).tolist() == [9, 9, 6]
    # Loss on target and EOS: exactly one EOS, although EOS pads, and neither prompt nor padding.
    learned = [ids[mask == 1] for ids, mask in zip(arrays["input_ids"], arrays["loss_mask"], strict=True)]
    assert [tokens(words, ids) for ids in learned] == ["the soup was great [SEP]", "yes [SEP]", "no . [SEP]"]
    assert "1 of 3 examples (33.33%) are longer than max_length=9" in caplog.text


def test_layout_of_gpt2(gpt2_like):
    """Li et al. 2022: `Ġsource <|endoftext|> Ġtarget <|endoftext|>`; every word has its space."""
    arrays = tokenize_completions(TextPairs(("a pub",), ("the pub",)), gpt2_like, max_length=8)
    assert tokens(gpt2_like, arrays["input_ids"][0]) == (
        "Ġa Ġpub <|endoftext|> Ġthe Ġpub <|endoftext|> <|endoftext|> <|endoftext|>"
    )
    assert arrays["loss_mask"].tolist() == [[0, 0, 0, 1, 1, 1, 0, 0]]
    assert arrays["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1, 0, 0]]


def test_layout_of_the_real_llama(llama):
    arrays = tokenize_completions(TextPairs(("name : a",), ("The pub £",)), llama, max_length=16)
    [ids], [mask] = arrays["input_ids"], arrays["loss_mask"]
    assert tokens(llama, ids) == "<s> ▁nam e ▁ : ▁a <s> ▁The ▁p u b ▁ <0xC2> <0xA3> </s> </s>"
    assert mask.tolist() == [0] * 7 + [1] * 8 + [0]
    assert decode_completions([ids[7:]], llama) == ["The pub £"]


def test_a_pad_token_is_used(words):
    padded = copy.deepcopy(words)
    padded.pad_token = "[PAD]"
    arrays = tokenize_completions(PAIRS, padded, max_length=9)
    assert tokens(padded, arrays["input_ids"][2]) == "[CLS] film [CLS] no . [SEP] [PAD] [PAD] [PAD]"


def test_a_target_never_loses_its_beginning(words):
    arrays = tokenize_completions(PAIRS, words, max_length=5)
    assert [tokens(words, ids) for ids in arrays["input_ids"]] == [
        "[CLS] [CLS] the soup was",  # the whole source went first; no EOS, for the text did not end here
        "[CLS] c [CLS] yes [SEP]",
        "[CLS] [CLS] no . [SEP]",
    ]
    assert arrays["loss_mask"].sum(axis=1).tolist() == [3, 2, 3]


def test_a_separator_of_ones_own(words, gpt2_like):
    arrays = tokenize_completions(
        TextPairs(("a",), ("b",)),
        words,
        max_length=7,
        prompt_format=prompt_format_of(words, "separator", separator="? it was"),
    )
    assert tokens(words, arrays["input_ids"][0]) == "[CLS] a ? it was b [SEP]"
    assert tokenize_prompts(
        ["a"], words, max_length=6, prompt_format=prompt_format_of(words, "separator", separator="? it was")
    ) == [arrays["input_ids"][0][:5].tolist()]
    special = tokenize_prompts(
        ["a"],
        gpt2_like,
        max_length=6,
        prompt_format=prompt_format_of(gpt2_like, "separator", separator="<|endoftext|>"),
    )
    assert special == tokenize_prompts(["a"], gpt2_like, max_length=6)
    with pytest.raises(ValueError, match="separator '' has no tokens"):
        prompt_format_of(words, "separator", separator="")


texts = st.lists(st.sampled_from(["a", "pub", "the", "£5", "é", "<|endoftext|>", "</s>", "\n"]), min_size=1, max_size=9)


@pytest.mark.parametrize("name", ["words", "gpt2_like", "llama"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
def test_prompts_are_what_training_has_before_the_target(name, rows, request):
    tokenizer = request.getfixturevalue(name)
    pairs = TextPairs(*(tuple(" ".join(row[i]) + " a" for row in rows) for i in range(2)))
    arrays = tokenize_completions(pairs, tokenizer, max_length=300)
    prompts = tokenize_prompts(pairs.sources, tokenizer, max_length=300)
    for ids, attended, learned, prompt in zip(*arrays.values(), prompts, strict=True):
        assert ids[(attended == 1) & (learned == 0)].tolist() == prompt
        start = len(prompt)
        assert learned.tolist() == [0] * start + [1] * (attended.sum() - start) + [0] * (300 - attended.sum())
        # EOS stands at the end of the target and nowhere else in it, even if the text spells it.
        completion = ids[learned == 1].tolist()
        assert completion.index(tokenizer.eos_token_id) == len(completion) - 1
    if name != "words":  # it has no token for £ or <
        spoken = [ids[learned == 1] for ids, learned in zip(arrays["input_ids"], arrays["loss_mask"], strict=True)]
        assert decode_completions(spoken, tokenizer) == [text.strip() for text in pairs.targets]


def test_long_prompts(words, caplog):
    sources = ["a", "a b c d e", "a b c d"]
    with pytest.raises(ValueError, match=r"Prompt 2 has 7 tokens, .* max_length=5 fit \(2 of 3 .* begins 'a b c d e'"):
        tokenize_prompts(sources, words, max_length=5)
    with caplog.at_level(logging.INFO, "absl"):
        prompts = tokenize_prompts(sources, words, max_length=5, cut=True)
    assert [tokens(words, ids) for ids in prompts] == ["[CLS] a [CLS]", "[CLS] a b c [CLS]", "[CLS] a b c [CLS]"]
    assert "2 of 3 prompts were cut to 5 tokens" in caplog.text
    with pytest.raises(ValueError, match="max_length=2 has no room for a prompt"):
        tokenize_prompts(sources, words, max_length=2)
    assert tokenize_prompts([], words, max_length=5) == []


def test_decoding_ends_at_the_first_end(gpt2_like):
    eos = gpt2_like.eos_token_id
    the, pub = gpt2_like(" the pub", add_special_tokens=False)["input_ids"]
    ids = np.array([[the, pub, eos, the], [eos, eos, eos, eos], [the, the, the, pub]])
    assert decode_completions(ids, gpt2_like) == ["the pub", "", "the the the pub"]


def test_bad_rows_and_tokenizers(words, word_tokenizer):
    with pytest.raises(ValueError, match="max_length=2 leaves nothing of the target of row 1: 2 tokens are special"):
        tokenize_completions(PAIRS, words, max_length=2)
    with pytest.raises(ValueError, match=r"row 2: nothing of the target remains as tokens: it is ' \\n'"):
        tokenize_completions(TextPairs(("a", "b"), ("c", " \n")), words, max_length=9)
    with pytest.raises(ValueError, match="no examples"):
        tokenize_completions(PAIRS[:0], words, max_length=9)
    with pytest.raises(ValueError, match="object is not a fast tokenizer"):
        tokenize_completions(PAIRS, object(), max_length=9)
    with pytest.raises(ValueError, match=r"has no EOS token, .* tokenizer\.eos_token ="):
        tokenize_completions(PAIRS, word_tokenizer, max_length=9)


def test_the_cache(words, tmp_path, monkeypatch):
    expected = fingerprint(tokenize_completions(PAIRS, words, max_length=9))
    moved = TextPairs(("a b", "c d e f g", "h film"), PAIRS.targets)
    padded = copy.deepcopy(words)
    padded.pad_token = "[PAD]"
    question = prompt_format_of(words, "separator", separator="?")
    calls = [
        lambda: tokenize_completions(PAIRS, words, max_length=9, cache_dir=tmp_path),
        lambda: tokenize_completions(PAIRS, words, max_length=10, cache_dir=tmp_path),
        lambda: tokenize_completions(PAIRS, words, max_length=9, cache_dir=tmp_path, prompt_format=question),
        lambda: tokenize_completions(PAIRS, padded, max_length=9, cache_dir=tmp_path),
        lambda: tokenize_completions(moved, words, max_length=9, cache_dir=tmp_path),
        lambda: tokenize_completions(PAIRS[1:], words, max_length=9, cache_dir=tmp_path),
    ]
    for number, call in enumerate(calls, start=1):
        call()
        assert len(list(tmp_path.iterdir())) == number
    monkeypatch.setattr("dp_rmt.data.tokens.completions._tokenize", lambda *_: pytest.fail("tokenised again"))
    assert fingerprint(calls[0]()) == expected
    assert len(list(tmp_path.iterdir())) == len(calls)


def test_the_real_gpt2():
    """The tokens of Li et al. 2022's template, less the two spaces that it leaves before "<|endoftext|>"."""
    shared = os.environ.get("DP_RMT_SHARED")
    folder = pathlib.Path(shared or "") / "models" / "gpt2_tokenizer"
    if not shared or not folder.is_dir():
        pytest.skip("DP_RMT_SHARED does not name a folder that holds models/gpt2_tokenizer")
    vocabulary = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    gpt2 = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    arrays = tokenize_completions(TextPairs(("name : Blue Spice",), ("The pub.",)), gpt2, max_length=32)
    literature = gpt2(" name : Blue Spice <|endoftext|> The pub. <|endoftext|>")["input_ids"]
    expected = [token for token in literature if token != vocabulary["Ġ"]]
    assert arrays["input_ids"][0][: len(expected)].tolist() == expected
    assert (len(literature) - len(expected), arrays["attention_mask"].sum()) == (2, len(expected))
