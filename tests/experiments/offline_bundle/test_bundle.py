"""A bundle of a tiny project and a fake wheel: built by the script without an index, and installed without one."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import experiments

ROOT = Path(experiments.__file__).parents[1]
THIS_PYTHON = "{}.{}".format(*sys.version_info)

BACKEND = '''
import zipfile

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    name = "dp_rmt-9.0-py3-none-any.whl"
    with zipfile.ZipFile(f"{wheel_directory}/{name}", "w") as wheel:
        wheel.writestr("dp_rmt/__init__.py", "")
        wheel.writestr("dp_rmt-9.0.dist-info/METADATA", """Metadata-Version: 2.1
Name: dp_rmt
Version: 9.0
Provides-Extra: finetune
Requires-Dist: fake-core
Requires-Dist: fake-extra; extra == "finetune"
Requires-Dist: fake-newer; python_version >= "3.99"
""")
        tag = "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
        wheel.writestr("dp_rmt-9.0.dist-info/WHEEL", tag)
        wheel.writestr("dp_rmt-9.0.dist-info/RECORD", "")
    return name
'''
"""A build backend of the project's own, which needs nothing from an index."""


def write_wheel(folder: Path, name: str, version: str = "1.0", requires: str = "") -> None:
    """The smallest wheel that pip takes."""
    files = {
        f"{name}/__init__.py": f"__version__ = {version!r}\n",
        f"{name}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        + (f"Requires-Dist: {requires}\n" if requires else ""),
        f"{name}-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{name}-{version}.dist-info/RECORD"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        lines = []
        for path, text in files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            lines.append(f"{path},sha256={digest},{len(text)}")
            wheel.writestr(path, text)
        wheel.writestr(record, "\n".join([*lines, f"{record},,"]) + "\n")


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    return subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``(*options) -> folder of the unpacked bundle`` of a tiny checkout, with no index at hand."""
    checkout, index = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("index")
    for name in ("scripts/offline_bundle.sh", "experiments/__init__.py"):
        (checkout / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    shutil.copytree(ROOT / "experiments" / "offline_bundle", checkout / "experiments" / "offline_bundle")
    (checkout / "backend.py").write_text(BACKEND)
    build_system = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (checkout / "pyproject.toml").write_text(build_system)
    (checkout / "private.txt").write_text("not tracked")
    # The real dp_rmt beside the tiny project, which has none to import.
    (checkout / "dp_rmt").symlink_to(ROOT / "dp_rmt")
    run("git", "-C", checkout, "init", "--quiet")
    run("git", "-C", checkout, "add", "scripts", "experiments", "backend.py", "pyproject.toml")
    for name, requires in (("fake_core", "fake-leaf<2"), ("fake_extra", ""), ("fake_leaf", ""), ("fake_newer", "")):
        write_wheel(index, name, requires=requires)

    def built(*options: str) -> Path:
        folder = tmp_path_factory.mktemp("bundle")
        offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "HF_HUB_OFFLINE": "1"}
        archive = folder / "bundle.tar.gz"
        ended = run("bash", checkout / "scripts" / "offline_bundle.sh", f"--output={archive}", *options, **offline)
        assert ended.returncode == 0, ended.stderr
        assert archive.stat().st_mode & 0o077 == 0  # data may be private
        with tarfile.open(archive) as tar:
            assert {(member.uid, member.uname, member.mtime) for member in tar} == {(0, "", 0)}
            tar.extractall(folder, filter="data")
        return folder / "dp_rmt-bundle"

    return built


@pytest.fixture(scope="module")
def bundle(build: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = tmp_path_factory.mktemp("sources")
    (sources / "model").mkdir()
    weights = {"a": np.float32([[1.0, 1 / 3], [-7.0, 65504.0]]), "ids": np.arange(3)}
    safetensors.numpy.save_file(weights, sources / "model" / "model.safetensors", metadata={"format": "pt"})
    (sources / "model" / "config.json").write_text("{}")
    (sources / "model" / "pytorch_model.bin").write_text("the same again")
    (sources / "rows.tsv").write_text("sentence\tlabel\n")
    model, data = sources / "model", sources / "rows.tsv"
    return build(f"--model=whole={model}", f"--model_in_half=half={model}", f"--data=sst2={data}")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def wheel_names(bundle: Path) -> set[str]:
    return {name.partition("-")[0] for name in names(bundle / "wheels")}


def test_it_holds_wheels_project_models_and_data(bundle: Path) -> None:
    assert wheel_names(bundle) == {"dp_rmt", "fake_core", "fake_extra", "fake_leaf"}
    assert (bundle / "project" / "pyproject.toml").exists()
    assert not (bundle / "project" / "private.txt").exists()
    assert names(bundle / "models" / "whole") == {"config.json", "model.safetensors"}
    assert names(bundle / "data" / "sst2") == {"rows.tsv"}
    licences = (bundle / "LICENCES.md").read_text(encoding="utf-8")
    assert "| fake_core | 1.0 | not said | none |" in licences
    assert "LICENCES.md" in (bundle / "SHA256SUMS").read_text(encoding="utf-8")
    half = safetensors.numpy.load_file(bundle / "models" / "half" / "model.safetensors")
    assert {name: tensor.dtype.name for name, tensor in half.items()} == {"a": "float16", "ids": "int64"}
    np.testing.assert_allclose(half["a"], [[1.0, 1 / 3], [-7.0, 65504.0]], rtol=2**-11)  # half a unit of 10 bits


@pytest.mark.thorough
def test_what_the_machine_has_is_left_out(build: Callable[..., Path], tmp_path: Path) -> None:
    have = tmp_path / "have.txt"
    have.write_text("# pip freeze\nfake-core\nfake-leaf==2.1\n-e git+somewhere\nunrelated==1\n")
    bundle = build(f"--have={have}", "--extras=")
    # Version 2.1 of fake-leaf is not what fake-core accepts; fake-core is taken at its word.
    assert wheel_names(bundle) == {"dp_rmt", "fake_leaf"}


def test_what_only_the_other_python_asks_for_is_there(build: Callable[..., Path]) -> None:
    bundle = build("--python=3.99", "--extras=")
    assert wheel_names(bundle) == {"dp_rmt", "fake_core", "fake_leaf", "fake_newer"}
    ended = run("bash", bundle / "install.sh")
    assert ended.returncode == 1
    assert "the wheels are for Python 3.99" in ended.stderr


@pytest.mark.thorough
def test_it_installs_without_an_index(bundle: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    # An index that has something newer: whoever asks it would get that.
    page = tmp_path / "simple" / "fake-core"
    page.mkdir(parents=True)
    write_wheel(page, "fake_core", version="2.0")
    (page / "index.html").write_text('<a href="fake_core-2.0-py3-none-any.whl">fake_core-2.0-py3-none-any.whl</a>')
    ended = run("bash", bundle / "install.sh", environment, PIP_INDEX_URL=(tmp_path / "simple").as_uri())
    assert ended.returncode == 0, ended.stderr
    assert "installed dp_rmt 9.0" in ended.stdout
    code = "import fake_core, fake_extra, fake_leaf; print(fake_core.__version__)"
    said = run(environment / "bin" / "python", "-P", "-c", code, PYTHONPATH="")
    assert said.stdout == "1.0\n", said.stderr


def damaged(bundle: Path) -> None:
    (bundle / "data" / "sst2" / "rows.tsv").write_text("sentence\tlabel\nmore\t1\n")


def without_a_file(bundle: Path) -> None:
    (bundle / "models" / "whole" / "config.json").unlink()


def with_a_wheel_more(bundle: Path) -> None:
    write_wheel(bundle / "wheels", "fake_core", version="1.1")


@pytest.mark.parametrize("change", [damaged, without_a_file, with_a_wheel_more])
def test_what_was_changed_is_not_installed(bundle: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    change(copy)
    ended = run("bash", copy / "install.sh", tmp_path / "environment")
    assert ended.returncode == 1
    assert "Nothing was installed" in ended.stderr
    assert not (tmp_path / "environment").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--output=bundle.zip", "the name must end in one of .tar.xz"),
        ("--python=3", "give versions such as 3.12 and 2.28"),
        ("--model=a/b=c", "is not NAME=SOURCE with a plain name"),
        ("--packages=no_such_package", "no_such_package"),
    ],
)
def test_mistakes_end_in_one_clear_line(build: Callable[..., Path], tmp_path: Path, option: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        build("--extras=", option)


def test_the_same_files_give_the_same_archive(tmp_path: Path) -> None:
    from experiments.offline_bundle import archive

    hashes = []
    for place in ("one", "two"):
        folder = tmp_path / place / archive.FOLDER
        (folder / "data").mkdir(parents=True)
        (folder / "data" / "b").write_text("b")
        (folder / "data" / "a").write_text("a")
        archive.add_installer(folder, THIS_PYTHON, ["dp_rmt"])
        archive.write(folder, tmp_path / f"{place}.tar.xz")
        hashes.append(hashlib.sha256((tmp_path / f"{place}.tar.xz").read_bytes()).hexdigest())
    assert hashes[0] == hashes[1]
