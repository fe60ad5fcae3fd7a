"""What a statement is about: found where it can be, never a reason to fail, and without secrets."""

from __future__ import annotations

import subprocess

import pytest

from dp_rmt.reporting import provenance
from dp_rmt.reporting.provenance import Provenance


def git(folder, *arguments):
    settings = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *settings, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """A repository with a package at its top."""
    package = tmp_path / "project" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    git(package.parent, "init", "-q")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-qm", "first")
    return package


def test_the_commit_is_that_of_the_checkout_and_says_when_it_was_changed(checkout):
    head = git(checkout, "rev-parse", "HEAD")
    assert provenance.commit(checkout) == head
    (checkout.parent / "notes.txt").write_text("not of the project")
    assert provenance.commit(checkout) == head
    (checkout / "__init__.py").write_text("changed = True")
    assert provenance.commit(checkout) == f"{head}+changes"


def test_without_git_or_a_checkout_of_its_own_there_is_no_commit(checkout, tmp_path, monkeypatch):
    installed = checkout.parent / "venv" / "package"  # inside the repository of a project that uses it
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert provenance.commit(installed) is None
    loose = checkout.parent / "loose"  # at the top, but not of the repository
    loose.mkdir()
    assert provenance.commit(loose) is None
    assert provenance.commit(tmp_path / "nowhere" / "package") is None
    monkeypatch.setenv("PATH", "")
    assert provenance.commit(checkout) is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config.privacy.noise_seed=271828"],
        ["--config.privacy.noise_seed", "271828"],
        ["-config.privacy.sampling_seed=271828"],
        ["--config.privacy.sampling_seed", "271828", "--config.train.epochs=3"],
        ["--config.privacy.noise_seed=\n271828"],
    ],
)
def test_the_command_tells_no_seed(arguments):
    shown = provenance.command_line(["finetune.py", "--config=configs/base.py", *arguments])
    assert "271828" not in shown
    assert shown.startswith("finetune.py --config=configs/base.py ")
    assert shown.count("not shown") == 1
    assert ("--config.train.epochs=3" in shown) == (len(arguments) == 3)


def test_a_program_s_own_command_names_its_module(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/finetune.py", "--workdir=a b"])
    spec = type("Spec", (), {"name": "experiments.finetune"})
    monkeypatch.setattr("sys.modules", {"__main__": type("Main", (), {"__spec__": spec})})
    assert provenance.command_line() == "python -m experiments.finetune '--workdir=a b'"


def test_the_fingerprint_in_the_statement_confirms_the_data_to_those_alone_who_have_the_ledger():
    shown = provenance.keyed_fingerprint("a" * 32, "f" * 64)
    assert shown == provenance.keyed_fingerprint("a" * 32, "f" * 64)
    assert shown != provenance.keyed_fingerprint("b" * 32, "f" * 64)
    assert shown != provenance.keyed_fingerprint("a" * 32, "e" * 64)


def test_fields_of_another_version_are_left_out():
    assert Provenance.from_json({"task": "sst2", "new": 1}) == Provenance(task="sst2")
