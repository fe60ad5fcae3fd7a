"""What a user reads where the file system refuses: the path, the reason, and what to do."""

from __future__ import annotations

import errno
import os

import pytest
import safetensors

from dp_rmt import files


@pytest.mark.parametrize(
    ("code", "path", "expected"),
    [
        (errno.ENOSPC, "runs/a", "runs/a: no space left on device: free space there, or give a folder on another disk"),
        (errno.EDQUOT, "runs/a", "runs/a: disk quota exceeded: free some of your quota"),
        (errno.EACCES, "runs/a", "runs/a: permission denied: give a folder in which you may write"),
        (errno.EROFS, "runs/a", "runs/a: read-only file system: give a folder on a file system that can be written"),
    ],
)
def test_errors_of_the_file_system_have_path_reason_and_advice(code, path, expected):
    assert files.explained(OSError(code, os.strerror(code), path)).startswith(expected)
    with pytest.raises(OSError, match=expected) as caught, files.explaining():
        raise OSError(code, os.strerror(code), path)
    assert caught.value.errno == code


def test_errors_that_say_what_to_do_are_left_as_they_are():
    error = FileNotFoundError("there is no such run: give another folder")
    assert files.explained(error) == "there is no such run: give another folder"
    with pytest.raises(FileNotFoundError) as caught, files.explaining():
        raise error
    assert caught.value is error


def test_a_folder_under_a_file_is_refused_before_anything_is_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError) as caught:
        files.check_can_be_written(tmp_path / "file" / "runs" / "a")
    assert f"{tmp_path / 'file'} is a file, not a folder: give a path whose parents are folders" in files.explained(
        caught.value
    )
    files.check_can_be_written(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()


def test_a_folder_in_which_the_user_may_not_write_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    with pytest.raises(PermissionError) as caught:
        files.check_can_be_written(tmp_path / "runs")
    assert files.explained(caught.value) == (
        f"{tmp_path / 'runs'}: you may not write into {tmp_path}: give a folder in which you may write, or change the "
        "rights of this one"
    )


def test_a_full_disk_under_weights_is_an_error_of_the_file_system(tmp_path, monkeypatch):
    """The writer of safetensors has an error of its own."""

    def full(tensors, path, metadata):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        files.save_tensors({}, tmp_path / "model.safetensors")
    assert caught.value.errno == errno.ENOSPC
    assert "free space there" in files.explained(caught.value)
