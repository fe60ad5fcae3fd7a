"""What holds secrets is closed to others, whatever the umask, from the first moment on."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import optax
import pytest

from dp_rmt.files import close_to_others, make_private_folder, write_atomically, write_private
from dp_rmt.noise_addition import add_gaussian_noise, noise_key
from dp_rmt.training import checkpoint
from dp_rmt.training.checkpoint import Checkpoints
from dp_rmt.training.train_state import TrainState, Transforms

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")


@pytest.fixture(autouse=True, params=[0o022, 0o000])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


def state() -> TrainState:
    noise = add_gaussian_noise(0.1, noise_key(0))
    return TrainState.create(Transforms(noise, optax.identity(), optax.sgd(0.1)), {"a": jnp.ones(3)}, {})


def test_a_folder_is_private_from_its_making(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "chmod", lambda path, mode: pytest.fail("it was open before"))
    make_private_folder(tmp_path / "new" / "folder")
    assert mode(tmp_path / "new" / "folder") == 0o700
    assert mode(tmp_path / "new") & 0o055 == 0o055  # of the run, not of its secrets


def test_what_is_open_is_closed_and_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder").chmod(0o2755)
    (tmp_path / "file").touch()
    (tmp_path / "file").chmod(0o644)
    with caplog.at_level(logging.INFO, "absl"):
        make_private_folder(tmp_path / "folder")
        close_to_others(tmp_path / "file")
        make_private_folder(tmp_path / "folder")
    assert (mode(tmp_path / "folder") & 0o777, mode(tmp_path / "file")) == (0o700, 0o600)
    assert [message.split(" was open to others (mode ")[1][:4] for message in caplog.messages] == ["2755", "0644"]


@pytest.mark.parametrize("raises", [True, False])
def test_where_it_cannot_be_done_the_log_says_so(
    raises: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another owner's folder, or a file system that ignores modes: the run goes on."""

    def chmod(path: Path, mode: int) -> None:
        if raises:
            raise PermissionError(1, "Operation not permitted")

    tmp_path.chmod(0o755)
    monkeypatch.setattr(Path, "chmod", chmod)
    make_private_folder(tmp_path)
    assert "others may look into it: its mode is 0755, and could not be changed" in caplog.text
    assert ("Operation not permitted" in caplog.text) == raises


def test_without_modes_nothing_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o755)
    monkeypatch.setattr("dp_rmt.files.os.name", "nt")
    close_to_others(tmp_path)
    monkeypatch.undo()
    assert mode(tmp_path) == 0o755


def test_a_private_file_is_never_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    write_text = Path.write_text

    def spy(path: Path, text: str, **options: str) -> int:
        seen.append(mode(path))
        return write_text(path, text, **options)

    monkeypatch.setattr(Path, "write_text", spy)
    write_private(tmp_path / "file", "ε")
    assert seen == [0o600]
    assert mode(tmp_path / "file") == 0o600
    assert (tmp_path / "file").read_text(encoding="utf-8") == "ε"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_checkpoints_are_private_before_anything_is_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    manager = checkpoint._Manager

    class Spy(manager):  # type: ignore[misc, valid-type]
        def __init__(self, directory: Path, **options: object) -> None:
            seen.append((mode(directory), list(directory.iterdir())))
            super().__init__(directory, **options)

    monkeypatch.setattr(checkpoint, "_Manager", Spy)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", {})
    assert seen == [(0o700, [])]
    for step in (1, 2):
        checkpoints.save(step, state(), sampling_seed=1)
    checkpoints.close()
    assert mode(tmp_path / "run" / "checkpoints") == 0o700
    assert all(path.is_relative_to(tmp_path / "run" / "checkpoints") for path in tmp_path.rglob("*") if path.is_file())


def test_checkpoints_that_an_earlier_version_left_open_are_closed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", {})
    for step in (1, 2):
        checkpoints.save(step, state(), sampling_seed=1)
    checkpoints.close()
    (tmp_path / "checkpoints").chmod(0o755)
    digests = tmp_path / "checkpoints" / "2" / "sha256.json"
    digests.write_text(digests.read_text().replace('": "', '": "0'))  # damaged, so that it is put aside
    checkpoints = Checkpoints(tmp_path / "checkpoints", {})
    assert mode(tmp_path / "checkpoints") == 0o700
    assert checkpoints.restore(state()) is not None
    checkpoints.close()
    assert (tmp_path / "checkpoints" / "2.damaged").is_dir()
    assert "was open to others (mode 0755)" in caplog.text


def test_a_file_behind_a_symbolic_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link, target = tmp_path / "privacy.json", tmp_path / "disk" / "privacy.json"
    link.symlink_to(target)
    for text in ("first", "second"):
        write_atomically(link, text)
        assert link.is_symlink()
        assert target.read_text() == text
    assert [path.name for path in target.parent.iterdir()] == ["privacy.json"]
