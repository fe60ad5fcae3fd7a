"""The reviews: reproducible, balanced, distinct, and not solved by counting words."""

import collections
import re

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse

from dp_rmt.data import generate_reviews, get_task, load_glue, read_tsv, write_corpus
from dp_rmt.data.readers import synthetic_words as words

NUM_REVIEWS = 8000


@pytest.fixture(scope="module")
def private():
    return generate_reviews(NUM_REVIEWS, seed=0, domain="private")


@pytest.fixture(scope="module")
def public():
    return generate_reviews(NUM_REVIEWS, seed=0, domain="public")


def test_deterministic(private):
    assert generate_reviews(NUM_REVIEWS, seed=0, domain="private") == private
    assert generate_reviews(9, seed=0, domain="private") == private[:9]
    assert generate_reviews(9, seed=1, domain="private") != private[:9]
    # written down once: other machines and Python versions must make the same reviews
    assert private[0] == ("the orchestra is sloppy ; my friend hated their crowd .", 0)


def test_distinct_and_balanced(private, public):
    for reviews in (private, public):
        assert len(dict(reviews)) == NUM_REVIEWS
        # 5 standard deviations of a fair coin
        assert abs(np.mean([label for _, label in reviews]) - 0.5) < 2.5 / NUM_REVIEWS**0.5
    assert not set(dict(private)) & set(dict(public))


def test_size_of_reviews_and_vocabulary(private, public):
    vocabularies = [{word for text, _ in part for word in text.split()} for part in (private, public)]
    assert 400 <= len(set.union(*vocabularies)) <= 600
    assert 12 <= np.mean([len(text.split()) for text, _ in private]) <= 16
    assert max(len(text.split()) for text, _ in private + public) <= 32
    # every private word is known to the public part, but a private topic's words are rare there
    assert vocabularies[0] <= vocabularies[1]
    gadgets = {"phone", "laptop", "tablet", "keyboard", "battery"}
    shares = [np.mean([bool(gadgets & set(text.split())) for text, _ in part]) for part in (private, public)]
    assert shares[0] > 8 * shares[1] > 0


def test_topics_share_no_word_of_opposite_meaning():
    """A word that praises in one topic and blames in another would be label noise."""
    praise, blame = set(words.PRAISE), set(words.BLAME)
    for topic in words.TOPICS.values():
        praise |= set(topic.praise)
        blame |= set(topic.blame)
    assert not praise & blame
    assert not (praise | blame) & set(words.NEUTRAL)
    assert all(abs(sum(weights.values()) - 1) < 1e-9 for weights in words.TOPIC_WEIGHTS.values())


def test_the_later_clause_of_a_contrast_decides(private):
    """Read off plain contrasts with a known adjective right before the full stop."""
    verdict = dict.fromkeys(words.PRAISE, 1) | dict.fromkeys(words.BLAME, 0)
    seen = collections.Counter()
    for text, label in private:
        clauses = re.split(" , but | , yet | ; nevertheless ", text)
        tokens = clauses[-1].split()
        is_negated = {"never", "hardly", "nothing", "nobody"} & set(tokens)
        if len(clauses) == 1 or tokens[-2] not in verdict or is_negated:
            continue
        seen[verdict[tokens[-2]] == label] += 1
    assert seen[True] > 80
    assert seen[False] == 0


def test_no_single_word_decides(private):
    labels = np.array([label for _, label in private])
    has_word = (word_counts(private) > 0).astype(float)
    positive, total = has_word.T @ labels, has_word.sum(axis=0)
    accuracy = 0.5 + np.abs(positive - total * labels.mean()) / NUM_REVIEWS
    assert accuracy.max() < 0.55


def word_counts(reviews):
    vocabulary = {}
    for text, _ in reviews:
        for word in text.split():
            vocabulary.setdefault(word, len(vocabulary))
    rows = [row for row, (text, _) in enumerate(reviews) for _ in text.split()]
    columns = [vocabulary[word] for text, _ in reviews for word in text.split()]
    shape = (len(reviews), len(vocabulary))
    return scipy.sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape)


def test_a_bag_of_words_does_not_solve_it(private):
    """Logistic regression on word counts is far above chance (learnable), far below 1 (order matters)."""
    counts = word_counts(private)
    signs = np.array([2 * label - 1 for _, label in private])
    train, test = slice(0, 6000), slice(6000, None)
    train_counts = counts[train]

    def loss_and_gradient(weights):
        margins = signs[train] * (train_counts @ weights)
        slope = -signs[train] / (1 + np.exp(margins))
        loss = np.logaddexp(0, -margins).mean() + 1e-4 * weights @ weights
        return loss, train_counts.T @ slope / 6000 + 2e-4 * weights

    fitted = scipy.optimize.minimize(
        loss_and_gradient, np.zeros(counts.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 200}
    )
    accuracy = np.mean((counts[test] @ fitted.x > 0) == (signs[test] > 0))
    assert 0.7 < accuracy < 0.88


def test_corpus(tmp_path):
    folder = write_corpus(tmp_path / "a", num_public=30, num_private_train=20, num_private_dev=10, seed=3)
    data = load_glue("sst2", path=folder)
    public = read_tsv(get_task("sst2"), folder / "public.tsv")
    train, dev = data.train, data.evaluations["dev"]
    assert (len(public), len(train), len(dev)) == (30, 20, 10)
    assert len({*public.texts, *train.texts, *dev.texts}) == 60
    private = generate_reviews(30, seed=3, domain="private")
    assert list(zip(train.texts + dev.texts, [*train.labels, *dev.labels], strict=True)) == private
    again = write_corpus(tmp_path / "b", num_public=30, num_private_train=20, num_private_dev=10, seed=3)
    for name in ("public.tsv", "train.tsv", "dev.tsv"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()


def test_excluded_reviews_do_not_come_back(private):
    seen = dict(private[:100])
    assert not seen.keys() & dict(generate_reviews(100, seed=0, domain="private", exclude=seen)).keys()


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"domain must be one of \['private', 'public'\], got 'secret'"):
        generate_reviews(1, seed=0, domain="secret")
    with pytest.raises(ValueError, match="num_examples must not be negative, got -1"):
        generate_reviews(-1, seed=0, domain="public")
    with pytest.raises(ValueError, match=r"at least one review.*num_private_dev=0"):
        write_corpus(tmp_path, num_public=1, num_private_train=1, num_private_dev=0, seed=0)
