"""The scores against the numbers that the official E2E script gives on the same texts, and their laws."""

import os
import pathlib
import random

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_rmt.data import load_table_to_text
from dp_rmt.scoring import java, text_scores
from dp_rmt.scoring import texts as scores
from dp_rmt.scoring.caption_tokens import approximate_caption_words, official_caption_words
from dp_rmt.scoring.cider import cider
from dp_rmt.scoring.meteor import meteor
from dp_rmt.scoring.nist import nist
from dp_rmt.scoring.rouge_l import rouge_l

# Written for this test: one to four references, sums of money, contractions, brackets, a lone "0" (see `nist`).
HYPOTHESES = [
    "The Green Door is a cheap pub near the station.",
    "Loch Fyne doesn't serve wine; it is family-friendly (and costs £20-25).",
    "Zizzi won 0 of 3 games in 2004.",
    "A restaurant",
    "The score was 0 to 2.5, said Mr. Brown.",
    "There is a coffee shop called Aromi in the city centre, and it's rated 5 out of 5.",
]
REFERENCES = [
    ["The Green Door is a pub near the station.", "Near the station, the Green Door is a cheap place.", "It's cheap."],
    ["Loch Fyne doesn't serve wine, but it is family-friendly and costs £20-25."],
    ["Zizzi won 0 of their 3 games in 2004.", "In 2004 Zizzi won 0 of 3."],
    ["Cotto is a restaurant by the river that isn't cheap.", "By the river there is a restaurant, Cotto."],
    ["The score was 0 to 2.5 (so said Mr. Brown).", "Mr. Brown said the score was 0 to 2.5!", "0 to 2.5", "2.5."],
    ["Aromi is a coffee shop in the city centre rated 5 out of 5.", "In the city centre you'll find Aromi."],
]
# measure_scores.py of tuetschek/e2e-metrics (commit 1b9c4d8) on these texts: BLEU and NIST of its mteval-v13a.pl, which
# prints four decimals, the others of its COCO scripts.
OFFICIAL = {"bleu": 0.6205, "nist": 5.8387, "rouge_l": 0.82681037, "cider": 4.09167828}
OFFICIAL_METEOR = 0.49649165

needs_java = pytest.mark.skipif(
    java.find_caption_jars() is None, reason="Java and pycocoevalcap (the extra 'meteor') are not both installed"
)


def test_the_official_numbers_without_java():
    result = text_scores(HYPOTHESES, REFERENCES, use_java=False)
    assert result.pop("tokenizer") == "approximate"
    assert set(result) == set(OFFICIAL)  # METEOR is absent, not approximated
    assert result == pytest.approx(OFFICIAL, abs=6e-5)
    assert result["cider"] == pytest.approx(OFFICIAL["cider"], abs=1e-8)


@needs_java
@pytest.mark.slow  # METEOR reads its tables for ten seconds or more
def test_the_official_numbers_with_java():
    result = text_scores(HYPOTHESES, REFERENCES)
    assert result.pop("tokenizer") == "ptb"
    assert result == pytest.approx(OFFICIAL | {"meteor": OFFICIAL_METEOR}, abs=6e-5)
    assert result["meteor"] == pytest.approx(OFFICIAL_METEOR, abs=1e-8)


@needs_java
def test_approximate_words_are_the_official_ones_on_simple_text():
    texts = [*HYPOTHESES, *(text for texts in REFERENCES for text in texts), ""]
    texts += ["line\nbreak\u2028here", "50% off, 'now'!", "O'Brien paid $5 (€4)"]
    texts += ["The Café [sic] has 1:02:38 left... They're at J. Smith's & Co -- cannot go."]
    assert approximate_caption_words(texts) == official_caption_words(texts, java.find_caption_jars())


def test_rouge_and_cider_are_pycocoevalcaps_on_random_words():
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge")
    cider_scorer = pytest.importorskip("pycocoevalcap.cider.cider")
    rng = random.Random(0)
    texts = [["".join(rng.choices("abcd", k=1)) for _ in range(rng.randint(1, 12))] for _ in range(120)]
    hypotheses, references = texts[:30], [texts[30 + 3 * i :][: 1 + i % 3] for i in range(30)]
    coco_h = {i: [" ".join(words)] for i, words in enumerate(hypotheses)}
    coco_r = {i: [" ".join(words) for words in rows] for i, rows in enumerate(references)}
    assert rouge_l(hypotheses, references) == pytest.approx(rouge.Rouge().compute_score(coco_r, coco_h)[0], rel=1e-12)
    expected = cider_scorer.Cider().compute_score(coco_r, coco_h)[0]
    assert cider(hypotheses, references) == pytest.approx(expected, rel=1e-12)
    assert 0.5 < expected < 9.5


def test_bleu_takes_a_varying_number_of_references():
    """By sacrebleu's own counts for one reference each, and by the clipped counts over all of them by hand."""
    single = [texts[:1] for texts in REFERENCES]
    expected = sacrebleu.corpus_bleu(HYPOTHESES, [[texts[0] for texts in single]], lowercase=True).score / 100
    assert text_scores(HYPOTHESES, single, use_java=False)["bleu"] == pytest.approx(expected, rel=1e-12)
    # "a b c d e": all n-grams are in one reference or the other, and the closest length is its own.
    assert text_scores(["a b c d e"], [["a b c d e f", "b c d e x"]], use_java=False)["bleu"] == pytest.approx(1.0)


def length_penalty(ratio):
    return np.exp(np.log(0.5) / np.log(1.5) ** 2 * np.log(ratio) ** 2)


def test_nist_by_hand():
    references = [[["a", "b", "c"], ["c", "d", "a", "b"]]]  # 7 words; "a" and "b" twice, each "a" before a "b"
    unigrams = 2 * np.log2(7 / 2) / 2
    bigrams = np.log2(2 / 2)
    expected = length_penalty(2 / 3.5) * (unigrams + bigrams)
    assert nist([["a", "b"]], references) == pytest.approx(expected, rel=1e-12)


def test_nist_with_a_varying_number_of_references():
    """The length is 9 words over 3 / 2 references per row, not the sum of the rows' means, 1 + 4."""
    references = [[["a"]], [["a", "b", "c", "d"], ["e", "f", "g", "h"]]]
    unigrams = (2 * np.log2(9 / 2) + 3 * np.log2(9)) / 5
    bigrams = np.log2(2 / 1) / 3  # "a b"; after "b" there is always "c"
    expected = length_penalty(5 / 6) * (unigrams + bigrams)
    assert nist([["a"], ["a", "b", "c", "d"]], references) == pytest.approx(expected, rel=1e-12)


words = st.lists(st.sampled_from(["the", "pub", "a", "river", "cheap"]), min_size=1, max_size=8)
sets = st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=3)), min_size=2, max_size=4)


@settings(max_examples=60, deadline=None)
@given(sets, st.randoms(use_true_random=False))
def test_the_order_of_references_and_rows_does_not_matter(rows, rng):
    shuffled = [(hypothesis, rng.sample(texts, len(texts))) for hypothesis, texts in rng.sample(rows, len(rows))]
    for score in (nist, rouge_l, cider):
        before, after = (score(*map(list, zip(*some, strict=True))) for some in (rows, shuffled))
        assert after == pytest.approx(before, rel=1e-9, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(sets)
def test_a_copy_of_a_reference_has_the_best_score(rows):
    references = [texts for _, texts in rows]
    copies = [texts[0] for texts in references]
    assert rouge_l(copies, references) == pytest.approx(1.0, rel=1e-12)
    single = [[copy] for copy in copies]
    for score in (nist, cider):
        others = [hypothesis[: len(copy)] for (hypothesis, _), copy in zip(rows, copies, strict=True)]
        assert score(others, single) <= score(copies, single) + 1e-9


def test_empty_hypotheses_count():
    some = text_scores(["", *HYPOTHESES[1:]], REFERENCES, use_java=False)
    full = text_scores(HYPOTHESES, REFERENCES, use_java=False)
    assert all(some[name] < full[name] for name in OFFICIAL)
    none = text_scores([""], [["a pub"]], use_java=False)
    assert {name: none[name] for name in OFFICIAL} == dict.fromkeys(OFFICIAL, 0.0)


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        (["a", "b"], [["a"]], "2 hypotheses and 1 lists of references"),
        ([], [], "at least one"),
        (["a", "b"], [["a"], []], "Hypothesis 2 has no references"),
        (["a"], [["a", " "]], "Hypothesis 1 has an empty reference"),
        (["a"], ["a"], "list of lists"),
        ("a", [["a"]], "list of texts"),
    ],
)
def test_bad_input(hypotheses, references, message):
    with pytest.raises(ValueError, match=message):
        text_scores(hypotheses, references, use_java=False)


def test_without_java(monkeypatch):
    monkeypatch.setattr(java.shutil, "which", lambda _: None)
    assert text_scores(["a"], [["a"]])["tokenizer"] == "approximate"
    with pytest.raises(RuntimeError, match="Java or the package `pycocoevalcap` is missing"):
        text_scores(["a"], [["a"]], use_java=True)


def test_java_that_fails_loses_no_scores(monkeypatch, tmp_path, caplog):
    broken = java.CaptionJars(tmp_path / "none.jar", tmp_path / "none.jar")
    monkeypatch.setattr(scores, "find_caption_jars", lambda: broken)
    monkeypatch.setenv("PATH", str(tmp_path))  # no program `java`
    result = text_scores(["a"], [["a"]])
    assert (result["tokenizer"], "meteor" in result) == ("approximate", False)
    assert "The Stanford tokenizer failed" in caplog.text
    with pytest.raises(RuntimeError, match="METEOR failed"):
        meteor([["a"]], [[["a"]]], broken)


@pytest.mark.thorough
def test_the_real_e2e_test_set():
    """The first human text of each meaning against the others; numbers of the official script, as above."""
    shared = os.environ.get("DP_RMT_SHARED")
    folder = pathlib.Path(shared or "") / "data" / "e2e"
    if not shared or not folder.is_dir():
        pytest.skip("DP_RMT_SHARED does not name a folder that holds data/e2e")
    rows = [texts for texts in load_table_to_text("e2e", path=folder).evaluations["test"].references if len(texts) > 1]
    result = text_scores([texts[0] for texts in rows], [texts[1:] for texts in rows], use_java=False)
    assert len(rows) == 616
    assert result["bleu"] == pytest.approx(0.6046, abs=6e-5)
    assert result["nist"] == pytest.approx(8.9029, abs=6e-5)
    assert result["rouge_l"] == pytest.approx(0.6381129, abs=5e-4)  # by approximate words
    assert result["cider"] == pytest.approx(1.8572241, abs=5e-4)
