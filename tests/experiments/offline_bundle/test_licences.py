"""A bundle names the licence of every wheel, as its metadata has it."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from experiments.offline_bundle.licences import add_licences


def write_wheel(folder: Path, name: str, metadata: str, *files: str) -> None:
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{metadata}\n"
        )
        wheel.writestr(f"{name}/vendored/other-2.0.dist-info/METADATA", "Name: other\nVersion: 2.0\n")
        for file in files:
            wheel.writestr(f"{name}-1.0.dist-info/{file}", "")


@pytest.mark.parametrize(
    ("metadata", "files", "row"),
    [
        (
            "License-Expression: MIT AND Zlib\nClassifier: License :: OSI Approved :: BSD License",
            ["licenses/LICENSE", "licenses/vendored/NOTICE.txt", "RECORD"],
            "| fake | 1.0 | MIT AND Zlib | licenses/LICENSE, licenses/vendored/NOTICE.txt |",
        ),
        (
            "Classifier: License :: OSI Approved :: BSD License\nClassifier: Topic :: Text\nLicense: see below",
            ["COPYING"],
            "| fake | 1.0 | BSD License | COPYING |",
        ),
        ("License: Apache 2.0 | MIT\n        and its whole text", [], "| fake | 1.0 | Apache 2.0 / MIT | none |"),
        ("", [], "| fake | 1.0 | not said | none |"),
    ],
    ids=["expression", "classifier", "free text", "nothing"],
)
def test_the_licence_of_a_wheel(metadata: str, files: list[str], row: str, tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    write_wheel(tmp_path / "wheels", "fake", metadata, *files)
    add_licences(tmp_path)
    assert row in (tmp_path / "LICENCES.md").read_text(encoding="utf-8").splitlines()


def test_models_and_data_are_named_and_a_bundle_without_them_says_nothing_of_them(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    add_licences(tmp_path)
    assert "`models/`" not in (tmp_path / "LICENCES.md").read_text(encoding="utf-8")
    (tmp_path / "models" / "minilm").mkdir(parents=True)
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    add_licences(tmp_path)
    text = (tmp_path / "LICENCES.md").read_text(encoding="utf-8")
    assert "`models/` has `minilm`" in text
    assert "`data/` has `sst2`" in text
