"""The wheels of a bundle: which versions another machine needs, without those that it has."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_LEGACY = {"x86_64": ("manylinux2014", "manylinux2010", "manylinux1"), "aarch64": ("manylinux2014",)}


class Target(NamedTuple):
    """The machine that the bundle is for: Linux with this Python, processor and C library, such as 3.12, x86_64, 2.28.

    >>> Target("3.12", "aarch64", "2.18").pip_options()[-4:]
    ['--platform=manylinux_2_18_aarch64', '--platform=manylinux_2_17_aarch64', '--platform=manylinux2014_aarch64',
    '--platform=linux_aarch64']
    """

    python: str
    machine: str
    glibc: str

    def pip_options(self) -> list[str]:
        """What makes pip choose for this machine; it compares the names of platforms letter by letter."""
        if not re.fullmatch(r"3\.\d+", self.python) or not re.fullmatch(r"2\.\d+", self.glibc):
            raise ValueError(f"--python={self.python} --glibc={self.glibc}: give versions such as 3.12 and 2.28")
        newest = int(self.glibc.partition(".")[2])
        oldest = 5 if self.machine == "x86_64" else 17  # the first that manylinux wheels have
        platforms = [f"manylinux_2_{minor}" for minor in range(newest, oldest - 1, -1)]
        names = [f"{name}_{self.machine}" for name in (*platforms, *_LEGACY[self.machine], "linux")]
        return [
            *("--only-binary=:all:", "--implementation=cp", f"--python-version={self.python}"),
            *(f"--platform={name}" for name in names),
        ]

    def environment(self) -> dict[str, Any]:
        """Values of environment markers there."""
        return {
            **default_environment(),
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "platform_machine": self.machine,
            "sys_platform": "linux",
            "platform_system": "Linux",
            "os_name": "posix",
        }


def read_have(file: Path) -> dict[str, str | None]:
    """Name -> version of what a machine has, from the output of `pip freeze`; None for a name without a version.

    Raises:
      ValueError: a line is neither.
    """
    have: dict[str, str | None] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        line = line.partition("#")[0].strip()
        if not line or line.startswith("-"):  # an option, or an editable install
            continue
        try:
            requirement = Requirement(line)
        except InvalidRequirement as error:
            raise ValueError(f"--have: {file.name}, line {number}: {error}; give NAME or NAME==VERSION") from error
        pins = [one.version for one in requirement.specifier if one.operator == "=="]
        have[canonicalize_name(requirement.name)] = pins[0] if pins else None
    return have


def build_own(project: Path, folder: Path) -> Path:
    """Builds the project's wheel into a folder."""
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:  # a build leaves folders beside its sources
        copy = Path(scratch) / "project"
        subprocess.run(["cp", "-r", project, copy], check=True)
        _pip("wheel", "--no-deps", f"--wheel-dir={folder}", str(copy))
    (wheel,) = folder.glob("*.whl")
    return wheel


def collect(
    own: Path,
    extras: Sequence[str],
    packages: Sequence[str],
    target: Target,
    have: Mapping[str, str | None],
    folder: Path,
) -> list[str]:
    """Downloads what the machine lacks.

    Args:
      own: the project's wheel.
      extras: of the project.
      packages: further requirements.
      target: the machine.
      have: what it has, from `read_have`.
      folder: where the wheels go.

    Returns:
      The requirements to install there.

    Raises:
      RuntimeError: pip finds no versions that fit together and have a wheel for the machine; the message is pip's.
    """
    name = own.name.partition("-")[0]
    wanted = f"{name}[{','.join(extras)}]" if extras else name
    resolved = resolve([f"{wanted} @ {own.as_uri()}", *packages], target)
    asked = list(_requirements(resolved.values(), [wanted, *packages], target))
    pins = [
        f"{item['name']}=={item['version']}"
        for key, item in resolved.items()
        if key != canonicalize_name(name) and not _is_there(key, have, asked)
    ]
    if pins:
        _pip("download", "--no-deps", f"--dest={folder}", *target.pip_options(), *pins)
    return [wanted, *packages]


def resolve(requirements: Sequence[str], target: Target) -> dict[str, dict[str, Any]]:
    """The metadata of everything that is to be installed, by name.

    pip evaluates environment markers with the Python that it runs in. What only the target's Python asks for is looked
    for in the metadata, and resolved with the rest once more.
    """
    given = list(requirements)
    while True:
        with tempfile.TemporaryDirectory() as scratch:
            report = Path(scratch) / "report.json"
            _pip(
                *("install", "--dry-run", "--ignore-installed", f"--target={scratch}/none", f"--report={report}"),
                *target.pip_options(),
                *given,
            )
            installed = json.loads(report.read_text(encoding="utf-8"))["install"]
        found: dict[str, dict[str, Any]] = {
            canonicalize_name(item["metadata"]["name"]): item["metadata"] for item in installed
        }
        roots = [requirement.partition(" @ ")[0] for requirement in requirements]
        missing = {
            str(Requirement(f"{requirement.name}{requirement.specifier}"))
            for requirement in _requirements(found.values(), roots, target)
            if canonicalize_name(requirement.name) not in found
        }
        if not missing:
            return found
        given += sorted(missing)


def _requirements(metadata: Iterable[Mapping[str, Any]], roots: Sequence[str], target: Target) -> Iterator[Requirement]:
    """All that these packages ask for on the target, with the extras that one of them asks of another."""
    asks = {canonicalize_name(item["name"]): item.get("requires_dist", []) for item in metadata}
    extras: dict[str, set[str]] = defaultdict(lambda: {""})
    queue, seen = [Requirement(root) for root in roots], set()
    while queue:
        requirement = queue.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        yield requirement
        name = canonicalize_name(requirement.name)
        extras[name] |= requirement.extras
        for other in map(Requirement, asks.get(name, [])):
            environments = [target.environment() | {"extra": extra} for extra in extras[name]]
            if other.marker is None or any(other.marker.evaluate(environment) for environment in environments):
                queue.append(other)


def _is_there(name: str, have: Mapping[str, str | None], asked: Sequence[Requirement]) -> bool:
    """Whether the machine has it, in a version that everything in the bundle accepts."""
    if name not in have:
        return False
    version = have[name]
    return version is None or all(
        requirement.specifier.contains(version, prereleases=True)
        for requirement in asked
        if canonicalize_name(requirement.name) == name
    )


def _pip(*arguments: str) -> None:
    """Runs pip; what it says on an error becomes the message."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        said = "\n".join(line for line in ended.stderr.splitlines() if line.startswith("ERROR")) or ended.stderr[-2000:]
        raise RuntimeError(
            f"pip {arguments[0]} failed:\n{said}\nA package without a wheel for that Python and platform cannot be "
            "bundled: choose another version by --packages, or another --python"
        )
