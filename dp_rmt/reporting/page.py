"""`report.html`: one self-contained page about one or several runs, for people.

Plots are embedded; the page needs no network and no scripts. Everything that came from raw private values
stands in a section of its own, marked as such.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dp_rmt.files import write_atomically
from dp_rmt.reporting.advice import FALSE_ALARMS, advice_by_run
from dp_rmt.reporting.figures import figures_of
from dp_rmt.reporting.markup import escape, figure, grid, inline, section, table
from dp_rmt.reporting.numbers import align, number
from dp_rmt.reporting.plots import Plot
from dp_rmt.reporting.series import Run, findings, headline, labels
from dp_rmt.reporting.statement_section import statement_section
from dp_rmt.reporting.style import CSS

__all__ = ["Run", "results_table", "write_report"]


# The policy allows what the page uses and nothing else: its own style sheet, by its hash, and pictures in the page. The
# page shows rows of data and what a model made of them. Were any of that not escaped, it could neither run nor be sent.
_STYLE_HASH = base64.b64encode(hashlib.sha256(CSS.encode()).digest()).decode("ascii")
_POLICY = f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; img-src data:; base-uri 'none'; form-action 'none'"


def write_report(path: str | os.PathLike[str], runs: Mapping[str, Run]) -> None:
    """Writes one self-contained HTML page about the runs, replaced atomically.

    Args:
      path: the file, usually `report.html` in a workdir; its folder must exist.
      runs: name -> run, in the order to be shown; at least one.

    Raises:
      ValueError: there is no run.
    """
    if not runs:
        raise ValueError(f"nothing to report: {path} needs at least one run")
    write_atomically(path, _page(runs))


def results_table(runs: Mapping[str, Run]) -> str:
    """The table on top of the report as aligned lines for the terminal: a row per run."""
    header, rows = headline(runs)
    return align([header, *rows])


def _page(runs: Mapping[str, Run]) -> str:
    figures = figures_of(runs)
    title = _title(runs)
    body = [
        f"<header><p class='kicker'>private fine-tuning</p><h1>{escape(title)}</h1>{_subject(runs)}</header>",
        _banner(runs),
        section("Results", _headline(runs), grid(figures.scores)),
        section("What limits the run", *_advice(runs), grid(figures.advice)),
        section("What the models write", _texts(runs)),
        section("Privacy", grid(figures.epsilon), *statement_section(runs)),
        section("Denoising", grid(figures.denoising), *map(figure, figures.heat_maps)),
        section("Seen from the raw data", _nonprivate(runs, figures.nonprivate), css="nonprivate"),
        section("Optimisation", grid(figures.optimisation)),
        section("Configuration", *_configs(runs)),
    ]
    return (
        "<!DOCTYPE html>\n<html lang='en'><head>"
        f"<meta http-equiv='Content-Security-Policy' content=\"{_POLICY}\"><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='color-scheme' content='light dark'>"
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def _title(runs: Mapping[str, Run]) -> str:
    configs = [run.config for run in runs.values()]
    names = list(dict.fromkeys(str(config["name"]) for config in configs if config.get("name")))
    epsilons = {run.privacy.get("epsilon") for run in runs.values()}
    if len(runs) == 1 and names in ([], labels(runs)):  # it was given no name, and is called as every single arm is
        names = [_base_model(run.privacy.get("about") or {}) for run in runs.values()]
    title = ", ".join(filter(None, names)) or ", ".join(labels(runs))
    epsilon = epsilons.pop() if len(epsilons) == 1 else None
    return title if epsilon is None else f"{title} at ε = {number(epsilon, 'up')}"


def _subject(runs: Mapping[str, Run]) -> str:
    """Model, data, version and date, and how far the runs have come."""
    records = [run.privacy for run in runs.values()]
    abouts = [record.get("about") or {} for record in records]
    rows = {
        "Model": _each(_model(about) for about in abouts),
        "Data": _each(_data(record, about) for record, about in zip(records, abouts, strict=True)),
        "Progress": _each(map(_progress, runs.values())),
        "Version": _each(_version(about) for about in abouts),
        "Date": _date(max((str(record["date"]) for record in records if record.get("date")), default="")),
    }
    terms = "".join(f"<dt>{name}</dt><dd>{inline(text)}</dd>" for name, text in rows.items() if text)
    return f"<dl>{terms}</dl>" if terms else ""


def _each(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(text for text in texts if text))


def _model(about: Mapping[str, Any]) -> str:
    tuning = f", trained: {about['tuning']}" if about.get("tuning") else ""
    return f"{about['base_model']}{tuning}" if about.get("base_model") else ""


def _base_model(about: Mapping[str, Any]) -> str:
    """The model's name, or the last part of its folder's path: long paths are no titles."""
    path = str(about.get("base_model") or "")
    package = path.removeprefix("package:")
    return package.split("/")[0] if package != path else path.rstrip("/").rpartition("/")[2]


def _date(date: str) -> str:
    """A date of the statement, ``2026-11-28T18:59:32+00:00``, as people write it."""
    try:
        return f"{datetime.datetime.fromisoformat(date).astimezone(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return date


def _data(record: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    rows = f"{record['num_examples']:,} training {record.get('unit', 'example')}s" if record.get("num_examples") else ""
    return ", ".join(part for part in (str(about.get("task") or ""), rows) if part)


def _progress(run: Run) -> str:
    train = run.config.get("train")
    planned = train.get("num_steps") if isinstance(train, Mapping) else None
    done = f"{run.last_step:,}" + (f" of {planned:,}" if planned else "") + " updates"
    ended = planned is not None and run.last_step >= planned
    return done if ended or not run.privacy.get("is_upper_bound") else f"{done}, not finished"


def _version(about: Mapping[str, Any]) -> str:
    commit = f", commit {about['commit'][:12]}" if about.get("commit") else ""
    return f"dp_rmt {about['version']}{commit}" if about.get("version") else ""


def _banner(runs: Mapping[str, Run]) -> str:
    notes = []
    not_private = [label for label, run in zip(labels(runs), runs.values()) if run.privacy.get("epsilon") is None]
    if not_private:
        names = ", ".join(not_private)
        notes.append(f"**NOT private: {names}.** There is no guarantee for the training examples.")
    if any(run.nonprivate_names for run in runs.values()):
        notes.append(
            "**Keep this page private.** It shows values computed from raw training examples "
            "(`nonprivate/...`), which the privacy guarantee does not cover."
        )
    if any(run.texts for run in runs.values()):
        data = dict.fromkeys(str(run.privacy.get("texts_of") or "the evaluation data") for run in runs.values())
        notes.append(
            f"**This page shows rows of {', '.join(data)} word for word.** The privacy guarantee does not cover them: "
            "keep this page and `texts.jsonl` as private as that data."
        )
    return "".join(f"<p class='banner' role='note'>{inline(note)}</p>" for note in notes)


def _headline(runs: Mapping[str, Run]) -> str:
    header, rows = headline(runs)
    sentences = findings(runs)
    caveats = ["“Best” is picked by looking at the evaluation data, so it is too hopeful; “final” is not."]
    if sentences:
        caveats.append("One run per arm: small differences can be chance.")
    return (
        "".join(f"<p class='finding'>{inline(sentence)}</p>" for sentence in sentences)
        + table(header, rows)
        + f"<p class='note'>{' '.join(caveats)} Training time leaves out evaluation.</p>"
    )


def _advice(runs: Mapping[str, Run]) -> list[str]:
    """A sentence for every run that was measured, and what it rests on."""
    sentences = [
        f"<p class='finding'>{inline(f'**{label}**: ' if len(runs) > 1 else '')}{inline(sentence)}</p>"
        for label, sentence in advice_by_run(runs).items()
    ]
    note = (
        "Computed from what the mechanism released, so that the guarantee covers it. A run whose loss rises behind no "
        f"step is said to overshoot with a probability of at most {FALSE_ALARMS:.0%}."
    )
    return [*sentences, f"<p class='note'>{note}</p>"] if sentences else []


def _texts(runs: Mapping[str, Run]) -> str:
    """The same sources beside what each run made of them."""
    writers = {label: run.texts for label, run in zip(labels(runs), runs.values()) if run.texts}
    if not writers:
        return ""
    rows = [[texts[0]["source"], *(text["text"] for text in texts)] for texts in zip(*writers.values())]
    return table(["source", *writers], rows)


def _nonprivate(runs: Mapping[str, Run], plots: Sequence[Plot]) -> str:
    if not plots:
        return ""
    skipped = sum(float(run.series("nonprivate/nonfinite_examples").values.sum()) for run in runs.values())
    note = "**Not private.** Computed from raw training examples, for diagnosis; do not publish."
    if skipped:
        note += f" {skipped:,.0f} examples had a gradient that is not finite; they contributed nothing."
    return f"<p>{inline(note)}</p>{grid(plots)}"


def _configs(runs: Mapping[str, Run]) -> list[str]:
    configs = {label: _without_seeds(run.config) for label, run in zip(labels(runs), runs.values())}
    flat = {label: flatten(config) for label, config in configs.items()}
    keys = dict.fromkeys(key for config in flat.values() for key in config)
    rows = [[key, *(str(config.get(key, "–")) for config in flat.values())] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    parts = [f"<h3>What differs between the runs</h3>{table(['key', *flat], rows)}"] if rows else []
    for label, config in configs.items():
        text = escape(json.dumps(config, indent=2, default=str, ensure_ascii=False))
        parts.append(f"<details><summary>config of {escape(label)}</summary><pre>{text}</pre></details>")
    return parts


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one level of dotted keys.

    >>> flatten({"privacy": {"epsilon": 3.0}, "name": "sst2"})
    {'privacy.epsilon': 3.0, 'name': 'sst2'}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _without_seeds(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without the seeds of sampling and noise: whoever knows them can subtract the noise."""
    return {
        key: _without_seeds(value)
        if isinstance(value, Mapping)
        else ("(given; not shown)" if key.endswith("_seed") and value is not None else value)
        for key, value in config.items()
    }
