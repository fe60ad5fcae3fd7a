"""CustomerSim (Shi et al. 2021, arXiv 2108.12944): dialogues with a support bot, from a database of people."""

from __future__ import annotations

import os
import pathlib
import re
import tarfile

from dp_rmt.data.readers.documents import Document

ARCHIVE, DATABASE = "simdial.tar.gz", "database_20000.csv"
_SPLITS = {"train": "train", "valid": "dev", "test": "test"}
_MEMBER = re.compile(r"(?:.*/)?(?P<split>train|valid|test)/(?P<kind>dial|canary)-(?P<number>\d+)\.txt")


def read_customersim(folder: str | os.PathLike[str], *, skip_lines: int = 0) -> dict[str, list[Document]]:
    """Reads the dialogues as they were published, each as a text file in `simdial.tar.gz`.

    Args:
        folder: holds `simdial.tar.gz` of github.com/wyshi/lm_privacy.
        skip_lines: how many lines at the start of each dialogue are left out, such as greetings. With two of them left
            out, the name and the number are within 128 tokens of a small vocabulary. Canaries stay whole.

    Returns:
        "train", "dev" and "test". Each holds the dialogues in the order of their numbers and then the canaries, without
        sensitive spans.

    Raises:
        FileNotFoundError: there is no such archive.
        ValueError: the archive is damaged, or is another one; the message names the member.
    """
    archive = pathlib.Path(folder) / ARCHIVE
    if not archive.is_file():
        raise FileNotFoundError(
            f"{archive} does not exist: it comes with github.com/wyshi/lm_privacy, beside {DATABASE}. Set "
            "--config.data.path to the folder that holds both."
        )
    found: dict[str, list[tuple[bool, int, Document]]] = {split: [] for split in _SPLITS.values()}
    try:
        with tarfile.open(archive) as members:
            for member in members:
                match = _MEMBER.fullmatch(member.name)
                if match is None or not member.isfile():
                    continue
                content = members.extractfile(member)
                assert content is not None  # the member is a file
                is_canary = match["kind"] == "canary"
                text = _text(content.read(), f"{archive}, {member.name}", 0 if is_canary else skip_lines)
                document = Document(text, f"{archive}, {member.name}, line 1", is_canary)
                found[_SPLITS[match["split"]]].append((is_canary, int(match["number"]), document))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{archive} is damaged ({error}). Download it again.") from error
    if missing := [split for split, entries in found.items() if not entries]:
        raise ValueError(f"{archive} holds no files {missing[0]}/dial-NUMBER.txt: it is not CustomerSim's.")
    return {split: [entry[2] for entry in sorted(entries, key=lambda e: e[:2])] for split, entries in found.items()}


def _text(content: bytes, where: str, skip_lines: int) -> str:
    try:
        text = "\n".join(content.decode("utf-8").strip().split("\n")[skip_lines:])
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text ({error}).") from None
    if not text:
        raise ValueError(f"{where} has no text after its first {skip_lines} lines.")
    return text
