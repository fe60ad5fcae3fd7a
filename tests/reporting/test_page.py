"""report.html shows every recorded metric, one arm or several, and can be opened anywhere."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html.parser
import re
from typing import Any

import numpy as np
import pytest

from dp_rmt.reporting import page as report
from dp_rmt.reporting.figures import Figures
from dp_rmt.reporting.page import Run, results_table, write_report
from dp_rmt.reporting.plots import COLORS, STYLE, Heat, Line, Plot, heat_maps, heat_ranges, line_plot, thin
from dp_rmt.reporting.privacy_statement import PrivacyStatement
from dp_rmt.reporting.provenance import Provenance
from dp_rmt.reporting.series import Series, duration, findings, headline, main_scores
from dp_rmt.reporting.style import CSS

VOID = {"meta", "img", "br"}
QUERY, OUT = "encoder/layers/attention/query/kernel", "encoder/layers/out/kernel"


def privacy(**changes):
    fields: dict[str, Any] = {
        "epsilon": 2.5,
        "target_epsilon": 3.0,
        "delta": 1e-5,
        "epsilon_pld": 2.5,
        "epsilon_rdp": 2.9,
        "noise_multiplier": 0.75,
        "l2_clip_norm": 0.1,
        "clip": "flat",
        "sampling_probability": 0.1,
        "expected_batch_size": 100,
        "max_batch_size": 160,
        "num_steps": 8,
        "num_examples": 1000,
        "noise_std": 1e-4,
        "seeds_from": "os entropy",
        "nonprivate_metrics": True,
        "evaluation_data": ("dev",),
    }
    return PrivacyStatement(**(fields | changes)).to_json()


def arm(*, gain=0.05, denoise=True, nonprivate=True, num_steps=8, **changes) -> Run:
    metrics: list[dict[str, Any]] = [{"step": 0, "eval/dev/accuracy": 0.5, "eval/dev/loss": 0.7}]
    for step in range(1, num_steps + 1):
        line: dict[str, Any] = {
            "step": step,
            "learning_rate": 1e-3 / step,
            "seconds": 2.0,
            "epsilon": 0.3 * step,
        }
        if denoise:
            line["denoise/kept_rank"] = {QUERY: [step % 3, 1, 0], OUT: [step % 2]}
            line["denoise/top_over_edge"] = {QUERY: [1.5, 1.1, 0.98], OUT: [2.0 / step]}
        if nonprivate:
            names = ("loss", "grad_norm", "clipped_fraction", "nonfinite_examples", "batch_size")
            line |= {f"nonprivate/{name}": 0.5 for name in names}
            line |= {"nonprivate/cosine_noisy": 0.1, "nonprivate/cosine_denoised": 0.6}
        metrics.append(line)
        if step % 2 == 0:
            metrics.append({"step": step, "eval/dev/accuracy": 0.5 + gain * step, "eval/dev/loss": 0.6 - step / 99})
    config = {
        "name": "sst2",
        "train": {"warmup_steps": 3 * denoise},
        "privacy": {"noise_seed": 20250704, "sampling_seed": None},
    }
    return Run(metrics, config, privacy(**changes))


class Page(html.parser.HTMLParser):
    """Checks that elements are balanced; collects headings, alternative texts and all text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, Any]] = []
        self.text: list[str] = []
        self.sections: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing at {self.getpos()}"

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)
        if self.open and self.open[-1] == "h2":
            self.sections.append(data)


def page_of(tmp_path, runs) -> Page:
    write_report(tmp_path / "report.html", runs)
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_two_arms(tmp_path):
    runs = {"denoised": arm(), "noisy": arm(gain=0.03, denoise=False)}
    page = page_of(tmp_path, runs)
    expected = ["Results", "Privacy", "Denoising", "Seen from the raw data", "Optimisation", "Configuration"]
    assert page.sections == expected
    alts = [image["alt"] for image in page.images]
    for part in (
        "Line plot of accuracy on dev",
        "Line plot of loss on dev",
        "Line plot of ε at δ = 1e-5",
        "Heat maps of denoised",
        "matrices denoised",
        "edge of the noise",
        "cosine to the clean gradient",
        "gradient norm",
        "clipped examples",
        "learning rate",
        "training loss",
    ):
        assert sum(part in alt for alt in alts) == 1, part
    assert "denoised: 0.5 at update 0, 0.9 at update 8; noisy: 0.5 at update 0, 0.74 at update 8" in alts[0]
    assert "before training: 0.5" in alts[0]
    text = " ".join("".join(page.text).split())
    assert "Keep this page private." in text
    assert "denoised ends at 90.00% accuracy on dev, noisy at 74.00%; denoised is there after 6 of 8" in text
    assert "costs ε = 5, δ = 2e-5 (basic composition)" in text
    assert "train.warmup_steps" in text  # what differs between the arms


def about(number):
    return Provenance(
        base_model="public/encoder", task="sst2", data_fingerprint=f"{number:032}", version="0.9", commit="abc123"
    )


def test_the_statement_is_made_once_for_all_arms(tmp_path):
    """Each has a fingerprint of its own, which is all that differs."""
    runs = {f"arm {i}": arm(num_steps=2, about=about(i), date="2026-11-28 17:00 UTC") for i in (1, 2)}
    text = " ".join("".join(page_of(tmp_path, runs).text).split())
    for once in ("What may be released", "The unit is one training example", "quantity", "noise multiplier0.75"):
        assert text.count(once) == 1, once
    assert text.count("Fingerprint of the training data") == 2
    assert f"arm 2: Fingerprint of the training data: {2:032}" in text


def test_arms_that_differ_have_columns_of_their_own(tmp_path):
    runs = {"a": arm(num_steps=2), "b": arm(num_steps=2, noise_multiplier=0.5)}
    text = " ".join("".join(page_of(tmp_path, runs).text).split())
    assert "noise multiplier0.750.5" in text
    assert "training examples1,000seeds" in text  # the same for both


def test_the_page_says_what_it_is_about(tmp_path):
    runs = {"run": arm(num_steps=2, about=about(1), date="2026-11-28 17:00 UTC", is_upper_bound=True)}
    runs["run"] = dataclasses.replace(runs["run"], config={"train": {"num_steps": 9}})
    text = " ".join(page_of(tmp_path, runs).text)
    assert "Model public/encoder Data sst2, 1,000 training examples Progress 2 of 9 updates, not finished" in text
    assert "Version dp_rmt 0.9, commit abc123 Date 2026-11-28 17:00 UTC" in text
    assert "encoder at ε = " in text  # a run without a name has that of its model


def test_what_is_long_on_top_of_the_page_is_shortened(tmp_path):
    where = dataclasses.replace(about(1), base_model="package:small_encoder/model", commit="0123456789abcdef" * 2)
    runs = {"run": arm(num_steps=2, about=where, date="2026-11-28T18:59:32+01:00")}
    runs["run"] = dataclasses.replace(runs["run"], config={"name": "run"})  # what it is called by default
    text = " ".join(page_of(tmp_path, runs).text)
    assert "Model package:small_encoder/model Data" in text
    assert "small_encoder at ε = " in text
    assert "commit 0123456789ab Date 2026-11-28 17:59 UTC" in text


def test_ticks_are_whole_numbers_where_values_hardly_differ():
    series = Series(np.arange(2), np.array([0.69462, 0.69463]))
    plot = line_plot([Line("a", series, 0)], ylabel="loss", caption="")
    texts = re.findall(r"<!-- (.*?) -->", plot.svg.decode())
    assert any(text.startswith("0.6946") for text in texts)
    assert not [text for text in texts if re.search(r"\de|\+", text)]


def test_one_type_size_light_and_dark():
    """Plots are drawn at 72 points to the inch and shown in their natural size, so that 12 points are 16 pixels."""
    assert re.findall(r"font(?:-size)?:[^;}]*", CSS) == ["font-size: 1rem"]
    sizes = {value for key, value in STYLE.items() if key.endswith("size")}
    assert sizes == {12}
    assert "prefers-color-scheme: dark" in CSS
    dark = re.search(r"prefers-color-scheme: dark\) \{ :root \{(.*?)\}", CSS, re.DOTALL)[1]
    light = re.search(r":root \{(.*?)\}", CSS, re.DOTALL)[1]
    colors = set(re.findall(r"--[\w-]+(?=:)", light))
    assert colors == set(re.findall(r"--[\w-]+(?=:)", dark)) == set(re.findall(r"(?<=var\()--[\w-]+", CSS))


@pytest.mark.thorough
def test_rows_that_stand_verbatim_have_a_banner(tmp_path):
    texts = [{"row": 0, "source": "name[Aromi]", "text": "Aromi is nice."}]
    quiet = dataclasses.replace(arm(nonprivate=False, nonprivate_metrics=False, texts_of="test"), texts=texts)
    text = " ".join("".join(page_of(tmp_path, {"run": quiet}).text).split())
    assert "This page shows rows of test word for word." in text
    assert "Keep this page private." not in text
    old = dataclasses.replace(quiet, privacy=privacy(nonprivate_metrics=False))  # of before the field
    assert "shows rows of the evaluation data word for word" in " ".join(page_of(tmp_path, {"run": old}).text)
    assert "word for word" not in " ".join(page_of(tmp_path, {"run": arm(nonprivate=False)}).text)


def test_epsilon_is_rounded_up_on_the_page_and_in_the_terminal(tmp_path):
    runs = {"run": arm(epsilon=8.00049, delta=1.23401e-5), "other": arm(epsilon=8.00049, delta=1.23401e-5)}
    text = " ".join(page_of(tmp_path, runs).text)
    assert "sst2 at ε = 8.001" in text
    assert "costs ε = 16.01, δ = 2.469e-5" in text
    assert results_table(runs).count("8.001") == 2
    assert results_table(runs).count("1.235e-5") == 2


def test_the_page_stands_alone(tmp_path):
    write_report(tmp_path / "report.html", {"run": arm()})
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in source
    assert not re.search(r"(src|href)=['\"](?!data:)", source)
    for image in Page(source).images:
        kind, data = image["src"].split(",", 1)
        assert kind == "data:image/svg+xml;base64"
        assert b"</svg>" in base64.b64decode(data, validate=True)
        assert len(image["alt"]) > 40


@pytest.mark.thorough
def test_equal_runs_give_equal_pages(tmp_path):
    for name in ("a.html", "b.html"):
        write_report(tmp_path / name, {"run": arm(num_steps=2)})
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_one_arm_without_denoiser_and_without_raw_values(tmp_path):
    page = page_of(tmp_path, {"run": arm(denoise=False, nonprivate=False, nonprivate_metrics=False)})
    assert page.sections == ["Results", "Privacy", "Optimisation", "Configuration"]
    text = "".join(page.text)
    assert "Keep this page private" not in text
    assert "What differs" not in text
    assert "basic composition" not in text


def test_a_run_that_is_not_private(tmp_path):
    run = arm(epsilon=None, noise_multiplier=0.0)
    run = Run([{**line, "epsilon": None} for line in run.metrics], run.config, run.privacy)
    page = page_of(tmp_path, {"plain": run})
    text = "".join(page.text)
    assert "NOT private: plain" in text
    assert "This run is NOT private" in text
    assert not any("ε" in image["alt"] for image in page.images)


@pytest.mark.parametrize(
    "metrics",
    [[], [{"step": 0, "eval/dev/accuracy": 0.5}], [{"step": 1, "learning_rate": None, "seconds": 1.0}]],
    ids=["nothing", "only the first evaluation", "one update"],
)
def test_a_run_that_has_hardly_begun(tmp_path, metrics):
    page = page_of(tmp_path, {"run": Run(metrics, {}, {})})
    assert "assume no privacy" in "".join(page.text)
    assert results_table({"run": Run(metrics, {}, {})}).splitlines()[1].startswith("run")


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one run"):
        write_report(tmp_path / "report.html", {})


def test_text_from_outside_is_escaped(tmp_path):
    evil = "_<script>alert('x')</script>&\"$"
    run = arm(num_steps=2)
    metrics = [*run.metrics, {"step": 2, f"eval/{evil}/accuracy": 0.5}]
    config = {"name": evil, evil: evil}
    page = page_of(tmp_path, {evil: Run(metrics, config, privacy(clip=evil, evaluation_data=(evil,)))})
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in source
    assert "".join(page.text).count(evil) >= 4
    assert any(evil in image["alt"] for image in page.images)


ATTACKS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "' onmouseover='alert(1)",
    '" style="color:red',
    "</style><style>*{display:none}</style>",
    "<a href=javascript:alert(1)>",
    "`</code><b>`",
    "**<i>**",
    "&lt;script&gt;",
    "<meta http-equiv=refresh content=0>",
    "]]><svg onload=alert(1)>",
    "<!--",
    "<base href=//evil>",
)


@pytest.mark.parametrize("evil", ATTACKS)
def test_no_row_and_no_name_becomes_a_part_of_the_page(tmp_path, evil, monkeypatch):
    """Elements and attributes of the page are those of a harmless word, and the attack stands in the word's place."""

    def page(word):
        plot = Plot(b"<svg></svg>", word, f"caption {word}")
        monkeypatch.setattr(report, "figures_of", lambda runs: Figures(*[[plot]] * 7))
        run = arm(num_steps=2, clip=word, evaluation_data=(word,), texts_of=word)
        metrics = [*run.metrics, {"step": 2, f"eval/{word}/accuracy": 0.5, "geometry/top_share": {word: 0.9}}]
        texts = [{"row": 0, "source": word, "text": f"of {word}"}]
        one = Run(metrics, {"name": word, word: word}, run.privacy, texts=texts)
        other = dataclasses.replace(run, metrics=metrics, title=f"other {word}", texts=texts)
        write_report(tmp_path / "report.html", {word: one, "other": other})
        return Elements((tmp_path / "report.html").read_text(encoding="utf-8"))

    found, harmless = page(evil), page("word")
    assert found.elements == harmless.elements
    assert {image["alt"] for image in found.images} == {evil}
    marks = str.maketrans("", "", "*`")  # of bold and code, which words may have
    assert "".join(found.text).translate(marks).count(evil.translate(marks)) >= 20


class Elements(Page):
    """The elements with the names of their attributes, in order, but for those that only mark up words."""

    def __init__(self, source):
        self.elements = []
        super().__init__(source)

    def handle_starttag(self, tag, attrs):
        super().handle_starttag(tag, attrs)
        if tag not in ("code", "strong"):
            self.elements.append((tag, *(name for name, _ in attrs)))


def test_the_policy_allows_what_the_page_has_and_comes_first(tmp_path):
    write_report(tmp_path / "report.html", {"run": arm(num_steps=2)})
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    (policy,) = re.findall(r"<head><meta http-equiv='Content-Security-Policy' content=\"(.*?)\">", source)
    (style,) = re.findall(r"<style>(.*?)</style>", source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert dict(directive.split(" ", 1) for directive in policy.split("; ")) == {
        "default-src": "'none'",
        "style-src": f"'sha256-{digest}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert not re.search(r"<[^>]* (style|on\w+)=", source)  # which it would not allow


def test_seeds_are_not_shown(tmp_path):
    text = "".join(page_of(tmp_path, {"run": arm(seeds_from="given in the config")}).text)
    assert "20250704" not in text
    assert "not shown" in text


def test_arms_that_share_seeds_are_not_to_be_released_together(tmp_path):
    run = arm(num_steps=2, seeds_from="given in the config")
    text = "".join(page_of(tmp_path, {"a": run, "b": run}).text)
    assert "Release one of the models at most" in text
    assert "basic composition" not in text


def test_headline():
    header, [row] = headline({"run": arm()})
    cells = dict(zip(header, row))
    assert cells["arm"] == "run"
    assert cells["final accuracy on dev"] == "90.00%"
    assert cells["best (at update)"] == "90.00% (8)"
    assert cells["ε"] == "2.5"
    assert cells["δ"] == "1e-5"
    assert cells["updates"] == "8"
    assert cells["noise multiplier"] == "0.75"
    assert cells["batch"] == "100"
    assert cells["training time"] == "16.0 s"
    lines = results_table({"run": arm(), "longer name": arm()}).splitlines()
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1


def test_best_is_not_final_and_lower_is_better_for_losses():
    losses = [{"step": step, "eval/dev/loss": value} for step, value in enumerate([0.7, 0.2, 0.4])]
    header, [row] = headline({"run": Run(losses, {}, {})})
    assert dict(zip(header, row))["best (at update)"] == "0.2000 (1)"
    assert dict(zip(header, row))["final loss on dev"] == "0.4000"


def test_one_main_score_per_evaluation_set():
    names = ["dev_m/loss", "dev_m/f1", "dev_m/accuracy", "dev_mm/loss", "dev_mm/matthews"]
    line = {"step": 0} | {f"eval/{name}": 0.5 for name in names}
    assert main_scores([Run([line], {}, {})]) == ["eval/dev_m/accuracy", "eval/dev_mm/matthews"]


def test_findings_need_two_curves():
    assert findings({"run": arm()}) == []
    assert len(findings({"a": arm(), "b": arm(gain=0.01), "c": arm(gain=0.02)})) == 2


def test_series_takes_the_last_of_a_repeated_step_and_skips_null():
    lines: list[dict[str, Any]] = [
        {"step": 2, "x": 1.0},
        {"step": 1, "x": 3.0},
        {"step": 2, "x": 2.0},
        {"step": 3, "x": None},
        {"step": 4},
    ]
    steps, values = Run(lines, {}, {}).series("x")
    assert steps.tolist() == [1, 2]
    assert values.tolist() == [3.0, 2.0]


def test_layer_series_is_layers_by_steps():
    lines: list[dict[str, Any]] = [
        {"step": 1, "r": {"a": [1, 2], "b": 5}},
        {"step": 3, "r": {"a": [3, None], "b": 6}},
        {"step": 4},
    ]
    series = Run(lines, {}, {}).layer_series("r")
    np.testing.assert_array_equal(series["a"].values, [[1, 3], [2, np.nan]])
    np.testing.assert_array_equal(series["b"].values, [[5, 6]])
    assert series["a"].steps.tolist() == [1, 3]


def test_thin_keeps_the_mean_and_the_end():
    values = np.random.default_rng(0).standard_normal((3, 1000))
    steps, means = thin(Series(np.arange(1, 1001), values), 300)
    assert len(steps) == means.shape[1] == 250
    assert steps[-1] == 1000
    np.testing.assert_allclose(means.mean(axis=1), values.mean(axis=1), rtol=0, atol=1e-12)
    short = Series(np.arange(3), np.arange(3.0))
    assert thin(short, 3) is short


def test_colour_scale_is_centred_at_the_edge():
    heat = Heat(
        {"k": Series(np.arange(2), np.array([[0.9, 4.0]]))},
        {"k": Series(np.arange(2), np.array([[0.0, 7.0]]))},
    )
    ratio, rank = heat_ranges([heat])
    assert ratio(np.log2(1.0)) == 0.5
    assert ratio(np.log2(4.0)) == 1.0
    assert ratio(np.log2(0.25)) == 0.0
    assert (rank.vmin, rank.vmax) == (0.0, 7.0)


@pytest.mark.parametrize("value", [0.0, 1.0, np.nan, 1e6])
def test_heat_maps_of_a_single_update(value):
    series = {"a/kernel": Series(np.array([5]), np.array([[value]]))}
    heat = Heat(series, series)
    plot = heat_maps(heat, heat_ranges([heat]), label="run")
    assert f"a: median y₁/e {value:.3g}, median kept rank {value:.3g}" in plot.alt


def test_curves_that_coincide_are_both_named():
    series = Series(np.arange(3), np.array([0.0, 1.0, 2.0]))
    plot = line_plot([Line("a", series, 0), Line("b", series, 1)], ylabel="ε", caption="")
    assert "a, b: 0 at update 0, 2 at update 2." in plot.alt
    assert COLORS[0].lower().encode() in plot.svg
    assert COLORS[1].lower().encode() not in plot.svg


def test_durations():
    assert duration(59.94) == "59.9 s"
    assert duration(59.96) == "1 min 00 s"
    assert duration(3599.6) == "1 h 00 min"
