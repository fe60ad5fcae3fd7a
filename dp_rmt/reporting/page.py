"""`report.html`: one self-contained page about one or several runs, for people.

Plots are embedded; the page needs no network and no scripts. Everything that came from raw private values
stands in a section of its own, marked as such.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dp_rmt.files import write_atomically
from dp_rmt.reporting.advice import FALSE_ALARMS, advice_by_run
from dp_rmt.reporting.figures import figures_of
from dp_rmt.reporting.numbers import align, number
from dp_rmt.reporting.plots import Plot
from dp_rmt.reporting.privacy_statement import PrivacyStatement, table_rows
from dp_rmt.reporting.privacy_text import sections
from dp_rmt.reporting.series import Run, findings, headline, labels
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
        f"<header><p class='kicker'>private fine-tuning</p><h1>{_escape(title)}</h1></header>",
        _banner(runs),
        _section("Results", _headline(runs), *map(_figure, figures.scores)),
        _section("What limits the run", *_advice(runs), *map(_figure, figures.advice)),
        _section("What the models write", _texts(runs)),
        _section("Privacy", *map(_figure, figures.epsilon), *_statements(runs)),
        _section("Denoising", _grid(figures.denoising), *map(_figure, figures.heat_maps)),
        _section("Seen from the raw data", _nonprivate(runs, figures.nonprivate), css="nonprivate"),
        _section("Optimisation", _grid(figures.optimisation)),
        _section("Configuration", *_configs(runs)),
    ]
    return (
        "<!DOCTYPE html>\n<html lang='en'><head>"
        f"<meta http-equiv='Content-Security-Policy' content=\"{_POLICY}\"><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{_escape(title)}</title><style>{CSS}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def _title(runs: Mapping[str, Run]) -> str:
    configs = [run.config for run in runs.values()]
    names = list(dict.fromkeys(str(config["name"]) for config in configs if config.get("name")))
    epsilons = {run.privacy.get("epsilon") for run in runs.values()}
    title = ", ".join(names) or ", ".join(labels(runs))
    epsilon = epsilons.pop() if len(epsilons) == 1 else None
    return title if epsilon is None else f"{title} at ε = {number(epsilon, 'up')}"


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
    return "".join(f"<p class='banner' role='note'>{_inline(note)}</p>" for note in notes)


def _headline(runs: Mapping[str, Run]) -> str:
    header, rows = headline(runs)
    sentences = findings(runs)
    caveats = ["“Best” is picked by looking at the evaluation data, so it is too hopeful; “final” is not."]
    if sentences:
        caveats.append("One run per arm: small differences can be chance.")
    return (
        "".join(f"<p class='finding'>{_inline(sentence)}</p>" for sentence in sentences)
        + _table(header, rows)
        + f"<p class='note'>{' '.join(caveats)} Training time leaves out evaluation.</p>"
    )


def _advice(runs: Mapping[str, Run]) -> list[str]:
    """A sentence for every run that was measured, and what it rests on."""
    sentences = [
        f"<p class='finding'>{_inline(f'**{label}**: ' if len(runs) > 1 else '')}{_inline(sentence)}</p>"
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
    return _table(["source", *writers], rows)


def _statements(runs: Mapping[str, Run]) -> list[str]:
    """The privacy statement of every run; runs with equal statements share one."""
    parts = [_joint_release(runs)]
    groups: dict[str, list[str]] = {}
    for label, run in zip(labels(runs), runs.values()):
        groups.setdefault(json.dumps(dict(run.privacy), sort_keys=True), []).append(label)
    for record, names in groups.items():
        heading = f"<h3>{_escape(', '.join(names))}</h3>" if len(runs) > 1 else ""
        if not json.loads(record):
            parts.append(f"{heading}<p>No privacy statement was written: assume no privacy.</p>")
            continue
        statement = PrivacyStatement.from_json(json.loads(record))
        text = "".join(
            f"<h4>{_escape(title)}</h4><ul>{''.join(f'<li>{_inline(line)}</li>' for line in paragraphs)}</ul>"
            for title, paragraphs in sections(statement)
        )
        numbers = _table(["quantity", "value"], [list(row) for row in table_rows(statement)])
        parts.append(f"{heading}<div class='statement'><div>{text}</div>{numbers}</div>")
    return parts


def _joint_release(runs: Mapping[str, Run]) -> str:
    """What releasing all private arms together would cost."""
    private = [run.privacy for run in runs.values() if run.privacy.get("epsilon") is not None]
    if len(private) < 2:
        return ""
    if any(record.get("seeds_from") != "os entropy" for record in private):
        text = (
            "Seeds were given, not drawn: runs that share them share noise, which cancels in their "
            "difference. **Release one of the models at most.**"
        )
    else:
        epsilon, delta = (sum(record[name] for record in private) for name in ("epsilon", "delta"))
        text = (
            f"Releasing the models of all {len(private)} private runs together costs ε = {number(epsilon, 'up')}, "
            f"δ = {number(delta, 'up')} (basic composition)."
        )
    return f"<p>{_inline(text)}</p>"


def _nonprivate(runs: Mapping[str, Run], plots: Sequence[Plot]) -> str:
    if not plots:
        return ""
    skipped = sum(float(run.series("nonprivate/nonfinite_examples").values.sum()) for run in runs.values())
    note = "**Not private.** Computed from raw training examples, for diagnosis; do not publish."
    if skipped:
        note += f" {skipped:,.0f} examples had a gradient that is not finite; they contributed nothing."
    return f"<p>{_inline(note)}</p>{_grid(plots)}"


def _configs(runs: Mapping[str, Run]) -> list[str]:
    configs = {label: _without_seeds(run.config) for label, run in zip(labels(runs), runs.values())}
    flat = {label: flatten(config) for label, config in configs.items()}
    keys = dict.fromkeys(key for config in flat.values() for key in config)
    rows = [[key, *(str(config.get(key, "–")) for config in flat.values())] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    parts = [f"<h3>What differs between the runs</h3>{_table(['key', *flat], rows)}"] if rows else []
    for label, config in configs.items():
        text = _escape(json.dumps(config, indent=2, default=str, ensure_ascii=False))
        parts.append(f"<details><summary>config of {_escape(label)}</summary><pre>{text}</pre></details>")
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


def _section(title: str, *parts: str, css: str = "") -> str:
    content = "\n".join(part for part in parts if part)
    return f"<section class='{css}'><h2>{_escape(title)}</h2>\n{content}</section>" if content else ""


def _grid(plots: Sequence[Plot]) -> str:
    return f"<div class='grid'>{''.join(map(_figure, plots))}</div>" if plots else ""


def _figure(plot: Plot) -> str:
    source = base64.b64encode(plot.svg).decode("ascii")
    return (
        f"<figure><img alt='{_escape(plot.alt)}' src='data:image/svg+xml;base64,{source}'>"
        f"<figcaption>{_inline(plot.caption)}</figcaption></figure>"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th scope='col'>{_escape(cell)}</th>" for cell in header)
    body = ""
    for first, *rest in rows:
        cells = "".join(f"<td>{_escape(cell)}</td>" for cell in rest)
        body += f"<tr><th scope='row'>{_escape(first)}</th>{cells}</tr>"
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _inline(text: str) -> str:
    """Escaped text with `code` and **bold**."""
    return _marked_up(_escape(text))


def _marked_up(text: str) -> str:
    """Every element is closed inside the one that it began in, whatever marks a name has of its own."""

    def element(found: re.Match[str]) -> str:
        code, bold = found.groups()
        return f"<strong>{_marked_up(bold)}</strong>" if code is None else f"<code>{code}</code>"

    return re.sub(r"`([^`]+)`|\*\*(.+?)\*\*", element, text)


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
