"""Rows of nothing private: special tokens in place, no padding, every token and label from the vocabulary."""

from __future__ import annotations

import numpy as np
import pytest

from dp_rmt.data.tokens.public_rows import public_text_rows, random_token_rows


def test_random_rows_have_special_tokens_around_and_none_inside(word_tokenizer):
    batches = random_token_rows(word_tokenizer, lengths=(6, 9), num_rows=20, num_labels=3)
    assert [batch["input_ids"].shape for batch in batches] == [(10, 6), (10, 9)]
    special = set(word_tokenizer.all_special_ids)
    for batch in batches:
        ids = batch["input_ids"]
        assert (ids[:, 0] == word_tokenizer.cls_token_id).all()
        assert (ids[:, -1] == word_tokenizer.sep_token_id).all()
        assert not special & set(ids[:, 1:-1].ravel().tolist())
        assert ids.max() < len(word_tokenizer)
        assert (batch["attention_mask"] == 1).all()
        assert (batch["loss_mask"] == 1).all()
        assert not batch["token_type_ids"].any()
        assert set(batch["label"].tolist()) <= {0, 1, 2}
        assert batch["mask_position"].max() < ids.shape[1]
    assert len({tuple(row) for row in batches[1]["input_ids"].tolist()}) == 10  # not the same row again


def test_the_seed_decides_and_scores_are_drawn_where_there_are_no_classes(word_tokenizer):
    one, same = (random_token_rows(word_tokenizer, lengths=(6,), num_rows=8, seed=1) for _ in range(2))
    (other,) = random_token_rows(word_tokenizer, lengths=(6,), num_rows=8, seed=2)
    np.testing.assert_array_equal(one[0]["input_ids"], same[0]["input_ids"])
    assert (one[0]["input_ids"] != other["input_ids"]).any()
    assert one[0]["label"].dtype == np.float32


def test_a_length_without_room_is_refused(word_tokenizer):
    with pytest.raises(ValueError, match="Rows of 2 tokens have no room"):
        random_token_rows(word_tokenizer, lengths=(2,), num_rows=8)


def test_public_text_is_cut_to_the_longest_length_that_it_fills(word_tokenizer):
    texts = ["a b c d e f g h", "a", "the film it was", "a b c d e f"]
    batches = public_text_rows(texts, word_tokenizer, lengths=(6, 8), num_rows=10, num_labels=2)
    shapes = [batch["input_ids"].shape for batch in batches]
    assert shapes == [(1, 6), (2, 8)]  # "a" fills neither
    assert word_tokenizer.convert_ids_to_tokens(batches[1]["input_ids"][0])[:3] == ["[CLS]", "a", "b"]
    (first,) = public_text_rows(texts, word_tokenizer, lengths=(6, 8), num_rows=1, num_labels=2)
    assert first["input_ids"].shape == (1, 8)
    with pytest.raises(ValueError, match="None of the 4 public texts has 50 tokens"):
        public_text_rows(texts, word_tokenizer, lengths=(50,), num_rows=10)
