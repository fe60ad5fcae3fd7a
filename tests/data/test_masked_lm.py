"""The tokenizer folder of the synthetic reviews, and the hiding of tokens for pre-training."""

import numpy as np
import pytest
import transformers

from dp_rmt.data import Examples, build_word_tokenizer, masked_lm_batch, tokenize_classification

SPECIAL = (0, 1, 2, 3, 4)  # [PAD] [UNK] [CLS] [SEP] [MASK]
VOCAB_SIZE = 50


def test_tokenizer_folder_round_trips(tmp_path):
    made = build_word_tokenizer(["The soup , the film !", "a a"], tmp_path / "tokenizer")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert loaded.is_fast
    assert loaded.get_vocab() == made.get_vocab()
    assert loaded.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert (loaded.pad_token_id, loaded.unk_token_id, loaded.mask_token_id) == (0, 1, 4)
    assert set(loaded.model_input_names) == {"input_ids", "token_type_ids", "attention_mask"}
    encoded = loaded("The soup!", "a zebra")
    tokens = loaded.convert_ids_to_tokens(encoded["input_ids"])
    assert " ".join(tokens) == "[CLS] the soup ! [SEP] a [UNK] [SEP]"
    assert encoded["token_type_ids"] == [0, 0, 0, 0, 0, 1, 1, 1]


def test_tokenizer_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="no words"):
        build_word_tokenizer(["", " "], tmp_path)


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    ids = rng.integers(5, VOCAB_SIZE, size=(300, 20)).astype(np.int32)
    attention_mask = (np.arange(20) < rng.integers(4, 21, size=(300, 1))).astype(np.int32)
    ids[:, 0] = 2
    ids = np.where(attention_mask == 1, ids, 0).astype(np.int32)
    return {"input_ids": ids, "attention_mask": attention_mask, "token_type_ids": np.zeros_like(ids)}


def draw(arrays, **options):
    defaults = {"mask_token_id": 4, "special_token_ids": SPECIAL, "vocab_size": VOCAB_SIZE, "batch_size": 64,
                "seed": 0, "step": 0}  # fmt: skip
    return masked_lm_batch(arrays, **(defaults | options))


def test_shapes_and_what_is_left_alone(arrays):
    batch = draw(arrays)
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids", "label"), ((64, 20), "int32")
    )
    original = np.where(batch["label"] >= 0, batch["label"], batch["input_ids"])
    known = {tuple(row) for row in arrays["input_ids"].tolist()}
    assert all(tuple(row) in known for row in original.tolist())
    assert not np.isin(batch["label"], SPECIAL).any()
    assert (batch["label"][batch["attention_mask"] == 0] == -1).all()
    assert (batch["input_ids"][:, 0] == 2).all()


def test_fractions(arrays):
    """15% of the words; of these 80% hidden, 10% random (a 45th of them the same by chance), 10% the same."""
    batch = draw(arrays, batch_size=20_000)
    is_word = (batch["attention_mask"] == 1) & (np.arange(20) > 0)
    is_target = batch["label"] >= 0
    num_targets = is_target.sum()
    hidden = (batch["input_ids"] == 4).sum() / num_targets
    unchanged = (batch["input_ids"] == batch["label"]).sum() / num_targets
    # 5 standard deviations of binomials of about 210,000 words and 32,000 targets
    assert is_target.sum() / is_word.sum() == pytest.approx(0.15, abs=0.004)
    assert hidden == pytest.approx(0.8, abs=0.012)
    assert unchanged == pytest.approx(0.1 + 0.1 / 45, abs=0.009)
    replaced = is_target & (batch["input_ids"] != 4) & (batch["input_ids"] != batch["label"])
    assert set(batch["input_ids"][replaced]) == set(range(5, VOCAB_SIZE))


def test_a_pure_function_of_seed_and_step(arrays):
    first = draw(arrays, step=3)
    for name, array in draw(arrays, step=3).items():
        np.testing.assert_array_equal(array, first[name])
    assert (draw(arrays, step=4)["input_ids"] != first["input_ids"]).any()
    assert (draw(arrays, step=3, seed=1)["input_ids"] != first["input_ids"]).any()


def test_works_on_a_tokenised_corpus(word_tokenizer):
    examples = Examples(("the soup was great",), None, None)
    text = tokenize_classification(examples, word_tokenizer, max_length=8)
    batch = draw(
        text,
        special_token_ids=word_tokenizer.all_special_ids,
        vocab_size=len(word_tokenizer),
        mask_probability=1.0,
    )
    assert (batch["label"][:, 1:5] == text["input_ids"][0, 1:5]).all()
    assert (np.delete(batch["label"], np.s_[1:5], axis=1) == -1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_probability": 0.0}, r"mask_probability must be in \(0, 1\], got 0\.0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"vocab_size": 5}, "All 5 tokens of the vocabulary are special"),
    ],
)
def test_errors(arrays, options, message):
    with pytest.raises(ValueError, match=message):
        draw(arrays, **options)
