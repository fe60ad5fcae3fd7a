"""The measurements of the study: what a trained decoder gives away, how good it is, and what a step of it costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dp_rmt.auditing import exposure, membership, memorisation
from dp_rmt.data import Document, evaluation_batches, tokenize_documents
from dp_rmt.finetuning.assemble import Run
from dp_rmt.reporting.records import five_digits
from dp_rmt.training.losses import Losses
from dp_rmt.training.train_state import TrainState
from dp_rmt.types import Params
from experiments.benchmarks.matrix_flops import matrix_flops

FPRS = (0.01, 0.001)

Losses_NxL = np.ndarray
Arrays = Mapping[str, np.ndarray]


def losses_by_token(losses: Losses, params: Params, arrays: Arrays, *, batch_size: int) -> Losses_NxL:
    """The loss of every token of a data set, (N, L) float32.

    Args:
      losses: compiled `dp_rmt.training.losses.token_losses`.
      params: all parameters.
      arrays: the tokenised data set.
      batch_size: number of rows at once.
    """
    found = [
        np.asarray(losses(params, batch))[~is_padding] for batch, is_padding in evaluation_batches(arrays, batch_size)
    ]
    return np.concatenate(found)


def privacy_of(
    base: Mapping[str, Losses_NxL], tuned: Mapping[str, Losses_NxL], arrays: Mapping[str, Arrays], *, num_canaries: int
) -> dict[str, Any]:
    """Fall of the loss on sensitive tokens of train and test, and membership of train against test.

    Args:
      base: losses by token of the pre-trained model on "train" and "test".
      tuned: losses by token of the fine-tuned model.
      arrays: tokenised "train" and "test".
      num_canaries: number of canaries, the last rows of "train". They are left out; their exposure is measured apart.
    """
    rows = {"train": slice(len(base["train"]) - num_canaries), "test": slice(None)}
    found: dict[str, Any] = {}
    scores: dict[str, dict[str, np.ndarray]] = {}
    for split, chosen in rows.items():
        before, after = base[split][chosen], tuned[split][chosen]
        is_target, is_sensitive = (arrays[split][name][chosen] != 0 for name in ("loss_mask", "sensitive_mask"))
        drop = memorisation.loss_drop(before, after, is_sensitive)
        found[f"sensitive_drop_{split}"] = five_digits(drop.mean)
        found[f"sensitive_drop_{split}_worst"] = round(drop.worst, 5)
        counts = is_target.sum(axis=1)
        example, example_before = after.sum(axis=1) / counts, before.sum(axis=1) / counts
        scores[split] = {
            "loss": membership.loss_scores(example),
            "relative_loss": membership.relative_loss_scores(example, example_before),
            "min_k": membership.min_k_scores(-after, is_target),
        }
    found["membership"] = {
        name: {
            "auc": five_digits(membership.auc(scores["train"][name], scores["test"][name])),
            **{
                f"tpr_at_{fpr:g}": five_digits(
                    membership.tpr_at_fpr(scores["train"][name], scores["test"][name], fpr).true_positive_rate
                )
                for fpr in FPRS
            },
        }
        for name in scores["train"]
    }
    return found


def utility_of(tuned_NxL: Losses_NxL, arrays: Arrays) -> list[float]:
    """Mean loss on the tokens that are not sensitive, with its interval."""
    is_ordinary = (arrays["loss_mask"] != 0) & (arrays["sensitive_mask"] == 0)
    return five_digits(memorisation.mean_loss(tuned_NxL, is_ordinary))


def canary_exposure(
    losses: Losses,
    params: Params,
    canaries: Sequence[Document],
    tokenizer: Any,
    *,
    num_secrets: int,
    batch_size: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Exposure of each distinct canary among copies of its text in which the secret's digits are random.

    Args:
      losses: as in `losses_by_token`.
      params: all parameters.
      canaries: marked documents; those with equal texts count once.
      tokenizer: the tokenizer of the model.
      num_secrets: number of random secrets, each digit of which is uniform.
      batch_size: number of texts at once.
      seed: seed of the secrets.

    Returns:
      For each text: ``sampled`` (skew-normal, extrapolates), ``ranked`` (by the rank among the random secrets, at most
      log2(num_secrets + 1) bits), the log2 of the number of all secrets, and how often the text was planted.

    Raises:
      ValueError: a canary has no digit among its sensitive characters.
    """
    rng = np.random.default_rng(seed)
    found = {}
    for canary in dict.fromkeys(canaries):
        texts = {canary.text: None} | dict.fromkeys(_with_other_digits(canary, num_secrets, rng))
        documents = [Document(text, canary.where) for text in texts]
        length = 2 + 2 * len(canary.text)
        arrays = tokenize_documents(documents, tokenizer, max_length=length)
        used = int(arrays["attention_mask"].sum(axis=1).max())
        arrays = {name: rows[:, :used] for name, rows in arrays.items()}
        totals = losses_by_token(losses, params, arrays, batch_size=batch_size).sum(axis=1, dtype=np.float64)
        found[canary.text] = {
            "sampled": round(exposure.sampled_exposure(totals[0], totals[1:]), 3),
            "ranked": round(exposure.exact_exposure(totals[0], totals[1:]), 3),
            "all_secrets_bits": round(len(_digits(canary)) * float(np.log2(10)), 3),
            "planted": sum(document.text == canary.text for document in canaries),
        }
    return found


def cost_of_step(run: Run, state: TrainState) -> dict[str, Any]:
    """FLOPs, memory and time of the compiled step, from four steps whose results are thrown away.

    Args:
      run: the run whose step is measured.
      state: the state to begin with. It is used up, because the steps reuse its memory.

    Returns:
      ``matrix_flops`` of a step on a batch of the expected size; ``xla_flops`` as XLA counts them (the bodies of loops
      over layers and microbatches once); bytes; and ``seconds_per_step``, which is processor time on a CPU, because
      other jobs disturb it less, and wall-clock time elsewhere.
    """
    mechanism, loop = run.loop.mechanism, run.loop
    sampling = mechanism.sampling(run.sampling_seed)
    batches = [loop.groups(sampling.indices(step)) for step in range(4)]
    step: Any = loop.train_step
    traced = step.trace(state, batches[0])
    compiled = traced.lower().compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    # Only the loop over the microbatches that are not empty has a length that the program does not tell.
    once, twice = (matrix_flops(traced.jaxpr, while_trips=trips) for trips in (1, 2))
    microbatches = mechanism.expected_batch_size / (loop.microbatch_size or mechanism.expected_batch_size)
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    seconds = []
    for groups in batches:
        start = clock()
        state, _ = step(state, groups)
        jax.block_until_ready(state.params)
        seconds.append(clock() - start)
    return {
        "expected_batch_size": mechanism.expected_batch_size,
        "matrix_flops": round(once + (microbatches - 1) * (twice - once)),
        "xla_flops": cost.get("flops"),
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "trained_parameters": trained,
        "seconds_per_step": round(statistics.median(seconds[1:]), 4),
    }


def _digits(canary: Document) -> list[int]:
    """The places of the secret's digits in the text."""
    places = [place for start, end in canary.spans for place in range(start, end) if canary.text[place].isdigit()]
    if not places:
        raise ValueError(
            f"{canary.where}: the canary {canary.text!r} has no digit among its sensitive characters, so there are no "
            "other secrets to compare it with. Mark its digits (a span, or config.data.sensitive with 'numbers')."
        )
    return places


def _with_other_digits(canary: Document, count: int, rng: np.random.Generator) -> list[str]:
    places, texts = _digits(canary), []
    for digits in rng.integers(10, size=(count, len(places))):
        characters = list(canary.text)
        for place, digit in zip(places, digits, strict=True):
            characters[place] = str(digit)
        texts.append("".join(characters))
    return [text for text in texts if text != canary.text]
