"""Arrays of fixed shape, truncation, the cache, and tokenizers that cannot do it."""

import copy
import logging
import os
import subprocess
import sys

import numpy as np
import pytest

from dp_rmt.data import Examples, fingerprint, get_task, tokenize_cached, tokenize_classification

SENTENCES = Examples(("a b", "a b c d e f", "film"), None, np.array([1, 0, 1], np.int32))
PAIRS = Examples(("a b c d", "a"), ("e f", "b c d e f"), np.array([2.5, 0.0], np.float32))


def words(tokenizer, ids):
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


def test_sentences(word_tokenizer, caplog):
    with caplog.at_level(logging.INFO, "absl"):
        arrays = tokenize_classification(SENTENCES, word_tokenizer, max_length=6)
    assert {name: (array.shape, array.dtype.name) for name, array in arrays.items()} == {
        "input_ids": ((3, 6), "int32"),
        "attention_mask": ((3, 6), "int32"),
        "token_type_ids": ((3, 6), "int32"),
        "label": ((3,), "int32"),
    }
    assert [words(word_tokenizer, ids) for ids in arrays["input_ids"]] == [
        "[CLS] a b [SEP] [PAD] [PAD]",
        "[CLS] a b c d [SEP]",
        "[CLS] film [SEP] [PAD] [PAD] [PAD]",
    ]
    assert arrays["attention_mask"].sum(axis=1).tolist() == [4, 6, 3]
    assert not arrays["token_type_ids"].any()
    assert arrays["label"].tolist() == [1, 0, 1]
    assert "1 of 3 examples (33.33%) are longer than max_length=6" in caplog.text


def test_pairs_lose_tokens_of_the_longer_text_first(word_tokenizer):
    arrays = tokenize_classification(PAIRS, word_tokenizer, max_length=7)
    assert [words(word_tokenizer, ids) for ids in arrays["input_ids"]] == [
        "[CLS] a b [SEP] e f [SEP]",
        "[CLS] a [SEP] b c d [SEP]",
    ]
    assert arrays["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]]
    assert arrays["label"].dtype == np.float32
    assert arrays["label"].tolist() == [2.5, 0.0]


def test_a_tokenizer_without_segments(byte_tokenizer):
    arrays = tokenize_classification(SENTENCES, byte_tokenizer, max_length=16)
    assert not arrays["token_type_ids"].any()
    assert (arrays["input_ids"][arrays["attention_mask"] == 0] == byte_tokenizer.pad_token_id).all()
    assert byte_tokenizer.decode(arrays["input_ids"][1], skip_special_tokens=True) == "a b c d e f"


def test_pads_on_the_right_whatever_the_tokenizer_prefers(word_tokenizer, monkeypatch):
    expected = tokenize_classification(SENTENCES, word_tokenizer, max_length=9)
    monkeypatch.setattr(word_tokenizer, "padding_side", "left")
    left = tokenize_classification(SENTENCES, word_tokenizer, max_length=9)
    assert fingerprint(left) == fingerprint(expected)


def test_unlabelled_text_has_no_label(word_tokenizer, tmp_path):
    text = Examples(("a b",), None, None)
    arrays = tokenize_cached(text, word_tokenizer, max_length=4, cache_dir=tmp_path)
    assert set(arrays) == {"input_ids", "attention_mask", "token_type_ids"}


def test_tokenizers_that_cannot_do_it(word_tokenizer):
    with pytest.raises(ValueError, match="has no room for text: 2 of its tokens are special"):
        tokenize_classification(SENTENCES, word_tokenizer, max_length=2)
    with pytest.raises(ValueError, match="no examples"):
        tokenize_classification(SENTENCES[:0], word_tokenizer, max_length=8)
    with pytest.raises(ValueError, match=r"object is not a fast tokenizer.*AutoTokenizer"):
        tokenize_classification(SENTENCES, object(), max_length=8)
    unpadded = copy.deepcopy(word_tokenizer)
    unpadded.pad_token = None
    with pytest.raises(ValueError, match=r"has no pad token.*tokenizer\.pad_token = "):
        tokenize_classification(SENTENCES, unpadded, max_length=8)


def cached(tokenizer, folder, examples=SENTENCES, **options):
    return tokenize_cached(examples, tokenizer, cache_dir=folder, **({"max_length": 6} | options))


def test_a_second_call_reads_the_cache(word_tokenizer, tmp_path, caplog, monkeypatch):
    first = cached(word_tokenizer, tmp_path / "cache")
    expected = tokenize_classification(SENTENCES, word_tokenizer, max_length=6)
    assert fingerprint(first) == fingerprint(expected)
    [file] = (tmp_path / "cache").iterdir()
    monkeypatch.setattr(type(word_tokenizer), "__call__", lambda *_, **__: pytest.fail("tokenised again"))
    with caplog.at_level(logging.INFO, "absl"):
        second = cached(word_tokenizer, tmp_path / "cache")
    assert fingerprint(second) == fingerprint(first)
    assert "1 of 3 examples (33.33%) are longer" in caplog.text
    assert [file] == list((tmp_path / "cache").iterdir())


def test_everything_that_matters_is_in_the_key(word_tokenizer, byte_tokenizer, tmp_path):
    infilling = get_task("cola").infilling
    relabelled = Examples(SENTENCES.texts, None, 1 - SENTENCES.labels)
    shifted = Examples(("a", "b a b c d e f", "film"), None, SENTENCES.labels)  # the same words in sequence
    calls = [
        lambda: cached(word_tokenizer, tmp_path),
        lambda: cached(word_tokenizer, tmp_path, max_length=7),
        lambda: cached(byte_tokenizer, tmp_path),
        lambda: cached(word_tokenizer, tmp_path, relabelled),
        lambda: cached(word_tokenizer, tmp_path, shifted),
        lambda: cached(word_tokenizer, tmp_path, PAIRS, max_length=7),
        lambda: cached(word_tokenizer, tmp_path, Examples(SENTENCES.texts, None, None)),
        lambda: cached(word_tokenizer, tmp_path, max_length=12, infilling=infilling),
        lambda: cached(word_tokenizer, tmp_path, max_length=12),
    ]
    for number, call in enumerate(calls, start=1):
        call()
        assert len(list(tmp_path.iterdir())) == number
    for call in calls:  # the tokenizer's memory of its last call is not part of the key
        call()
    assert len(list(tmp_path.iterdir())) == len(calls)


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def other_content(file):
    with np.load(file) as stored:
        arrays = dict(stored)
    arrays["label"] = arrays["label"] + 1
    np.savez(file, **arrays)


DAMAGE = {
    "flipped byte": flip_a_byte,
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:100]),
    "empty": lambda file: file.write_bytes(b""),
    "not an archive": lambda file: file.write_text("nothing"),
    "other content": other_content,
    "other arrays": lambda file: np.savez(file, label=np.zeros(3)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_rebuilt(damage, word_tokenizer, tmp_path, caplog):
    expected = fingerprint(cached(word_tokenizer, tmp_path))
    [file] = tmp_path.iterdir()
    damage(file)
    with caplog.at_level(logging.WARNING, "absl"):
        assert fingerprint(cached(word_tokenizer, tmp_path)) == expected
    assert f"{file} is damaged" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "absl"):
        assert fingerprint(cached(word_tokenizer, tmp_path)) == expected
    assert "damaged" not in caplog.text


def test_a_failed_write_leaves_nothing_behind(word_tokenizer, tmp_path, monkeypatch):
    def disk_full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez_compressed", disk_full)
    with pytest.raises(OSError, match="No space left"):
        cached(word_tokenizer, tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_torch(tmp_path):
    """Importing the floor loads neither torch nor transformers; tokenising works without torch installed."""
    program = f"""
import sys
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == "torch" else find_spec(name, *rest)
from dp_rmt import data
assert "torch" not in sys.modules
assert "transformers" not in sys.modules and "datasets" not in sys.modules
data.build_word_tokenizer(["a b c"], {str(tmp_path)!r})
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path)!r})
arrays = data.tokenize_classification(data.Examples(("a c",), None, None), tokenizer, max_length=5)
assert arrays["attention_mask"].tolist() == [[1, 1, 1, 1, 0]]
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=120)
