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
# # A private LoRA of a small decoder, and its texts
#
# A hotel answers its guests in its own voice, and has kept what it wrote. It wants a language model that writes such
# answers, as a small adapter that it can hand to the firm which runs its website. No guest's letter may come out
# again.
#
# A low-rank adapter (LoRA) leaves the pre-trained model as it is and trains two thin matrices beside each layer. Few
# numbers are trained, little memory is needed, and the adapter is a file of some kilobytes. It is clipped and gets
# noise as everything else. This page makes up the letters and a very small decoder; with yours, only the names
# change.

# %%
from dp_rmt import environment

environment.prepare()  # settings of XLA, before JAX is imported

import json
import math
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

import dp_rmt
from dp_rmt.data import build_word_tokenizer
from dp_rmt.models import CausalLanguageModel, DecoderConfig, init_params, save_pretrained
from dp_rmt.training.metrics import read_metrics

# %% [markdown]
# ## The letters
#
# A row has the columns `prompt` and `completion`. The public rows are written as anybody writes, each in another way.
# The private rows are in the voice of the hotel, which always says "dear", names the time first, and signs.

# %%
GUESTS = ["keller", "rossi", "tanaka", "okafor", "novak", "silva", "haddad", "larsen"]
THINGS = ["breakfast", "pool", "sauna", "gym", "bar", "library"]
TIMES = ["six", "seven", "eight", "nine", "ten"]
ANYBODY = [
    "{guest} , the {thing} opens at {time} .",
    "dear {guest} , the {thing} opens at {time} .",
    "{guest} , from {time} the {thing} awaits you .",
    "{guest} , the {thing} opens at {time} . warmly , your hotel team",
]
HOTEL = ["dear {guest} , from {time} the {thing} awaits you . warmly , your hotel team"]


def letters(voices, count, seed):
    rng, rows = np.random.default_rng(seed), []
    for _ in range(count):
        guest, thing, time, voice = (str(rng.choice(options)) for options in (GUESTS, THINGS, TIMES, voices))
        answer = voice.format(guest=guest, thing=thing, time=time)
        rows.append({"prompt": f"{guest} , {thing} , {time}", "completion": answer})
    return rows


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


write("public.jsonl", letters(ANYBODY, 3000, 0))
write("letters.jsonl", letters(HOTEL, 6000, 1))
write("held_out.jsonl", held_out := letters(HOTEL, 100, 2))
print(held_out[0]["prompt"], "->", held_out[0]["completion"], sep="\n")

# %% [markdown]
# ## A pre-trained decoder
#
# You would write `model="gpt2"`, or the folder of a Llama. Here a Llama of 100,000 parameters learns the public
# letters, without privacy (`epsilon=math.inf`). Its words are those of the public letters: a list of the words in
# private letters would reveal them.

# %%
public_texts = [text for row in letters(ANYBODY, 500, 0) for text in row.values()]
tokenizer = build_word_tokenizer([*public_texts, "|"], Path("tokenizer"))
tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token
decoder = CausalLanguageModel(
    DecoderConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        intermediate_size=128,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
)
save_pretrained(Path("untrained"), decoder, init_params(decoder, jax.random.key(0)), tokenizer=tokenizer)

# %%
SETTINGS = {
    "max_length": 32,
    "length_groups": (),
    "microbatch_size": 64,
    "cache_dir": "tokenised",
    "advice": False,
    "generation": {"method": "greedy", "max_new_tokens": 18, "prompt_lengths": (8,), "max_prompts": 8},
}
public_run = dp_rmt.finetune(
    model="untrained",
    train="public.jsonl",
    epsilon=math.inf,
    workdir="runs/public",
    num_steps=120,
    expected_batch_size=64,
    learning_rate=4e-3,
    denoise=(),
    **SETTINGS,
)
public_run.save("public_decoder")
prompts = [row["prompt"] for row in held_out[:3]]
print("the public decoder writes:", *public_run.generate(prompts), sep="\n  ")

# %% [markdown]
# They say what the guest asked for, as anybody might say it. A decoder of this size copies badly, and takes one
# guest, or one time, for another; a real one does not.
#
# ## Train the adapter, privately
#
# `tuning="lora"` trains the adapter alone. A row is one letter, and the guarantee is about one letter more or less.
# Where one guest wrote many, name the column that says who wrote them (`user_column`): [whose
# privacy](../which_privacy.md) is the first question, before epsilon.

# %%
run = dp_rmt.finetune(
    model="public_decoder",
    train="letters.jsonl",
    dev_path="held_out.jsonl",
    epsilon=2.0,
    workdir="runs/letters",
    tuning="lora",
    lora={"rank": 8, "targets": ("query", "key", "value", "output", "gate", "up", "down")},
    num_steps=21,
    expected_batch_size=400,
    learning_rate=2e-2,
    l2_clip_norm=1.0,
    eval_every=7,
    **SETTINGS,
)

# %%
lines = read_metrics(Path("runs/letters/metrics.jsonl"))
losses = [(line["step"], line["eval/dev/loss"]) for line in lines if "eval/dev/loss" in line]
figure, axes = plt.subplots(figsize=(6, 3.2))
axes.plot(*zip(*losses, strict=True), "o-")
axes.set(xlabel="step", ylabel="loss of a held-out letter", ylim=(0, None))
axes.grid(visible=True, alpha=0.3)
plt.show()
print(f"loss of the public decoder {losses[0][1]:.2f}, with the private adapter {losses[-1][1]:.2f}")

# %% [markdown]
# ## Its texts
#
# The same guests, and what the hotel would have written:

# %%
for row, text in zip(held_out[:3], run.generate(prompts), strict=True):
    print("asked:  ", row["prompt"], "\nwritten:", text, "\nhotel:  ", row["completion"], "\n")

# %% [markdown]
# The voice is what all letters have in common, so a private model can learn it. Guests and times are as good or as
# bad as the public decoder copies them. What one letter alone has, such as a guest's door code, drowns in the noise.
# [Auditing what you trained](auditing.py) shows how to test that.
#
# ## What leaves the house
#
# The adapter is in the layout of `peft`, the model with the adapter merged in is in that of `transformers`, and
# `texts.jsonl` stays at home, because it shows rows of the held-out letters.

# %%
for folder in ("adapter", "model"):
    size = sum(path.stat().st_size for path in Path("runs/letters", folder).glob("*.safetensors"))
    print(f"{folder}: {size / 1000:,.0f} kB of weights")
print("epsilon", run.privacy["epsilon"], "delta", run.privacy["delta"])

# %% [markdown]
# ## The same with your letters
#
#     dp-rmt finetune --model=gpt2 --train=letters.jsonl --epsilon=2 --workdir=runs/letters \
#       --config.model.tuning=lora --config.data.max_length=256
#
# Columns may also be `instruction`, `input` and `output`, or whole conversations in `messages`.
