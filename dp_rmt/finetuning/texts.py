"""The texts that a trained decoder writes for a split: each is kept as it comes, and all are scored at the end."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from dp_rmt.extras import extra
from dp_rmt.files import write_atomically
from dp_rmt.finetuning.settings import Generation
from dp_rmt.finetuning.tasks.task import Prompts, Task
from dp_rmt.generation import Beam, Greedy, Method, Sampling, generate_texts
from dp_rmt.scoring import text_scores
from dp_rmt.types import Params

with extra("finetune"):
    import tqdm

TEXTS, SCORES = "texts.jsonl", "scores.json"
WRITTEN_WITH = "generation.json"
"""What the texts depend on beside the model: the prompts, and the settings that choose tokens."""
_ONLY_SPEED = ("batch_size", "prompt_lengths")


def decoding(settings: Generation) -> Method:
    """The method that `config.generation` describes.

    Raises:
      ValueError: one of its settings is out of range.
    """
    shared: dict[str, Any] = {
        "max_new_tokens": settings.max_new_tokens,
        "no_repeat_ngram_size": settings.no_repeat_ngram_size,
    }
    if settings.method == "beam":
        return Beam(**shared, num_beams=settings.num_beams, length_penalty=settings.length_penalty)
    if settings.method == "sampling":
        chosen = {name: getattr(settings, name) for name in ("seed", "temperature", "top_k", "top_p")}
        return Sampling(**shared, **chosen)
    return Greedy(**shared)


def write_texts(folder: Path, task: Task, params: Params, settings: Generation, mesh: Mesh) -> dict[str, Any]:
    """Writes a text for every prompt, goes on where an interrupted call stopped, and scores them all.

    Args:
      folder: gets ``texts.jsonl`` (row, source, text, and the split that the source is taken from verbatim) and
        ``scores.json``; texts and scores that are there already are not made again, unless they were written with other
        settings or for other prompts (``generation.json``).
      task: a task with prompts.
      params: all parameters of the task's module.
      settings: `config.generation`.
      mesh: the devices that share each batch.

    Returns:
      The scores by name.

    Raises:
      ValueError: a prompt does not fit the model.
    """
    assert task.prompts is not None
    prompts, path = task.prompts, folder / TEXTS
    _remove_others(folder, prompts, settings)
    if (folder / SCORES).exists():
        return json.loads((folder / SCORES).read_text())
    texts = _written(path)
    rows = generate_texts(
        task.module,
        params,
        task.tokenizer,
        prompts.token_ids,
        decoding(settings),
        batch_size=-(-settings.batch_size // mesh.size) * mesh.size,
        prompt_lengths=settings.prompt_lengths,
        mesh=mesh if mesh.size > 1 else None,
        done=texts.keys(),
    )
    with (
        path.open("a", encoding="utf-8") as file,
        tqdm.tqdm(total=len(prompts.sources), initial=len(texts), desc=f"texts for {prompts.split}") as bar,
    ):
        for row, text in rows:
            texts[row] = text.strip()
            line = {"row": row, "source": prompts.sources[row], "text": texts[row], "verbatim_from": prompts.split}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            bar.update()
    scores = text_scores([texts[row] for row in range(len(prompts.sources))], prompts.references)
    write_atomically(folder / SCORES, json.dumps(scores, indent=1) + "\n")
    return scores


def samples(folder: Path, count: int) -> list[dict[str, Any]]:
    """The texts of the first `count` rows, in order; none if nothing was written."""
    path = folder / TEXTS
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    return sorted(lines, key=lambda line: line["row"])[:count]


def _remove_others(folder: Path, prompts: Prompts, settings: Generation) -> None:
    """Removes texts and scores of other settings or prompts, and notes down those that hold now."""
    rows = json.dumps([prompts.split, [list(map(int, ids)) for ids in prompts.token_ids], list(prompts.references)])
    facts = {name: value for name, value in settings.as_dict().items() if name not in _ONLY_SPEED}
    text = json.dumps(facts | {"prompts": hashlib.sha256(rows.encode()).hexdigest()}, indent=1) + "\n"
    noted = folder / WRITTEN_WITH
    if not noted.exists() or noted.read_text(encoding="utf-8") != text:
        for name in (SCORES, TEXTS):
            (folder / name).unlink(missing_ok=True)
        write_atomically(noted, text)


def _written(path: Path) -> dict[int, str]:
    """Row -> text of an earlier call; an unfinished last line, which a killed call leaves behind, is removed."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        write_atomically(path, whole.decode("utf-8"))
    lines = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
    return {line["row"]: line["text"] for line in lines}
