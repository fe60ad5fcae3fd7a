# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own CSV, private, in ten minutes
#
# A shop has a file of reviews that its customers wrote, and somebody has marked each of them as good or bad. The shop
# wants a classifier that it may give away. No customer shall have to fear that a review can be read out of it.
#
# This page goes all the way from the file to a model that may leave the house, with a statement of what it can
# reveal. With your own data you need `pip install -e ".[finetune]"`, a file with the columns `text` and `label`, and
# a pre-trained model. The page makes up both, so that it runs anywhere in a minute.

# %%
from dp_rmt import environment

environment.prepare()  # settings of XLA, before JAX is imported

import csv
import math
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

import dp_rmt
from dp_rmt.data import build_word_tokenizer
from dp_rmt.finetuning.plan import plan
from dp_rmt.models import EncoderConfig, MaskedLanguageModel, init_params, save_pretrained
from dp_rmt.training.metrics import read_metrics

# %% [markdown]
# ## The file
#
# `reviews.csv` is what the customers wrote, 10,000 reviews. `held_out.csv` has 500 more, to see how good the model
# is. Scores on it are not covered by the guarantee: keep them to yourself, or take reviews that are public. Half of
# the customers praise and blame in words that anybody uses, and half in words of their own, such as "janky".

# %%
ANYBODY = {
    "good": ["lovely", "great", "solid", "bright", "quick"],
    "bad": ["dreadful", "broken", "slow", "dull", "weak"],
}
CUSTOMERS = {"good": ["crisp", "snappy", "ace", "mint", "slick"], "bad": ["janky", "laggy", "meh", "bricked", "flaky"]}
THINGS = ["battery", "screen", "speaker", "camera", "charger", "case", "manual", "cable", "button", "lens"]
WHEN = ["today", "this week", "since monday", "after a month", "at first", "again"]


def reviews(count, seed, vocabularies):
    rng, rows = np.random.default_rng(seed), []
    for _ in range(count):
        label, words = str(rng.choice(["good", "bad"])), vocabularies[rng.integers(len(vocabularies))]
        thing, other, when, word = (str(rng.choice(options)) for options in (THINGS, THINGS, WHEN, words[label]))
        rows.append((f"i bought the {thing} and the {other} , and the {thing} is {word} {when}", label))
    return rows


def write(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


write("reviews.csv", reviews(10_000, 0, [ANYBODY, CUSTOMERS]))
write("held_out.csv", reviews(500, 1, [ANYBODY, CUSTOMERS]))
print(Path("reviews.csv").read_text(encoding="utf-8")[:330])

# %% [markdown]
# ## A pre-trained model
#
# Private training begins with a model that has read public text, because noise leaves little room for learning a
# language. You would name one here: `model="roberta-base"`. This page makes a very small one, and teaches it on
# public reviews, in which nobody says "janky". The same function does it: `epsilon=math.inf` is ordinary training,
# without privacy. The words of its tokenizer come from public text and from a dictionary, and not from the customers:
# a list of their words would reveal them.

# %%
public = reviews(2000, 2, [ANYBODY])
write("public.csv", public)
dictionary = [" ".join([*words["good"], *words["bad"]]) for words in (ANYBODY, CUSTOMERS)]
tokenizer = build_word_tokenizer([*(text for text, _ in public), *dictionary], Path("tokenizer"))
encoder = MaskedLanguageModel(
    EncoderConfig(
        architecture="bert",
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        type_vocab_size=2,
        layer_norm_eps=1e-12,
        pad_token_id=tokenizer.pad_token_id,
    )
)
save_pretrained(Path("untrained"), encoder, init_params(encoder, jax.random.key(0)), tokenizer=tokenizer)

# %%
SETTINGS = {
    "labels": ("bad", "good"),  # named, so that they are not read from private rows
    "max_length": 24,
    "length_groups": (),
    "microbatch_size": 128,
    "cache_dir": "tokenised",
}
public_run = dp_rmt.finetune(
    model="untrained",
    train="public.csv",
    epsilon=math.inf,
    workdir="runs/public",
    num_steps=50,
    expected_batch_size=64,
    learning_rate=5e-3,
    denoise=(),
    **SETTINGS,
)
public_run.save("public_model")

# %% [markdown]
# ## Train, privately
#
# `epsilon` is the privacy budget; [in figures](../start/privacy_in_figures.md) it is what somebody can find out at
# most. Before anything is trained the program prints its plan: rows, batch, steps, noise, epsilon and delta. With
# your own data leave `num_steps` and `expected_batch_size` out at first: they follow the number of rows.
#
# What is new in the customers' reviews is words, so the table of words alone is trained, and it gets the whole budget
# (`trainable`). A table has no layer's inputs and outputs, and nothing to denoise. For a large model
# [a low-rank adapter](private_lora.py) is the usual choice.

# %%
run = dp_rmt.finetune(
    model="public_model",
    train="reviews.csv",
    dev_path="held_out.csv",
    epsilon=2.0,
    workdir="runs/reviews",
    num_steps=21,
    expected_batch_size=500,
    learning_rate=3e-2,
    trainable="embeddings",
    denoise=(),
    eval_every=4,
    **SETTINGS,
)

# %%
print("plan:", plan(run.settings, num_examples=10_000))

# %% [markdown]
# ## Was it worth it?
#
# The run's folder has every number of the run in `metrics.jsonl`, and all of them drawn in `report.html`. Here are
# two: how good the model is, and how much of the budget is spent. Step 0 is the public model.

# %%
lines = read_metrics(Path("runs/reviews/metrics.jsonl"))


def series(name):
    return zip(*((line["step"], line[name]) for line in lines if name in line), strict=True)


figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
axes[0].plot(*series("eval/dev/accuracy"), "o-")
axes[0].set(xlabel="step", ylabel="accuracy on held_out.csv")
axes[1].plot(*series("epsilon"), "o-")
axes[1].set(xlabel="step", ylabel="epsilon spent", ylim=(0, 2.2))
plt.tight_layout()
plt.show()
accuracies = list(series("eval/dev/accuracy"))[1]
print(f"accuracy of the public model: {accuracies[0]:.1%}, after private training: {accuracies[-1]:.1%}")

# %% [markdown]
# The public model knows the words that anybody uses, and guesses at the others. What "janky" means is said by hundreds
# of customers, so a private model can learn it, and here it is all that there is to learn. What a single customer alone
# says it cannot learn, and that is the point.
#
# ## What it reveals
#
# Every run writes its statement, `privacy.md` for people and `privacy.json` for programs. Whoever has to sign for a
# release should read the first. It begins with the guarantee in words.

# %%
print("epsilon", run.privacy["epsilon"], "delta", run.privacy["delta"])
print(Path("runs/reviews/privacy.md").read_text(encoding="utf-8")[:1600])

# %% [markdown]
# ## Use it

# %%
for words in ("camera is lovely", "camera is snappy", "lens is flaky"):
    text = f"i bought the case and the {words.split()[0]} , and the {words} today"
    print(run.predict([text])[0], "<-", text)

# %% [markdown]
# ## Release it
#
# `save` copies what may be released, in the layout of Hugging Face, with the model's card and the statement.
# `transformers` loads the folder. All else in `runs/reviews` stays at home: the checkpoints hold the key of the
# noise, and whoever has it can take the noise away.

# %%
run.save("reviews_model")
print(sorted(path.name for path in Path("reviews_model").iterdir()))

# %% [markdown]
# ## The same with your file
#
#     dp-rmt finetune --model=roberta-base --train=reviews.csv --epsilon=2 --workdir=runs/reviews \
#       --config.data.labels="('bad', 'good')" --config.data.dev_path=held_out.csv
#
# If your columns have other names, say so: `--config.data.text_columns="('subject', 'body')"` and
# `--config.data.label_column=queue`. A row that cannot be read ends the run with its line and what to do.
#
# - [Choosing epsilon, delta, batch and steps](choosing.py)
# - [What the statement covers](../start/statement.md), for the colleague who has to sign
# - [It does not work](../start/troubleshooting.md)
