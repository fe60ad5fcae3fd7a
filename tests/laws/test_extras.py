"""The core dependencies are what the pieces need; what needs more names the extra, and the extra brings it."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import dp_rmt
from dp_rmt import finetuning
from dp_rmt.extras import check_installed, extra

PACKAGE = Path(dp_rmt.__file__).parent
SETUP = PACKAGE.parent / "setup.py"
MODULE = {"absl_py": "absl", "orbax_checkpoint": "orbax", "presidio_analyzer": "presidio_analyzer"}
"""Distributions whose module has another name."""


@pytest.fixture(scope="module")
def packaging():
    """What setup.py gives to setuptools."""
    found = {}
    setuptools = sys.modules.get("setuptools")
    stand_in = type(sys)("setuptools")
    stand_in.setup, stand_in.find_packages = found.update, lambda **_: []
    sys.modules["setuptools"] = stand_in
    try:
        exec(compile(SETUP.read_text(encoding="utf-8"), str(SETUP), "exec"), {"__file__": str(SETUP)})
    finally:
        del sys.modules["setuptools"]
        if setuptools is not None:
            sys.modules["setuptools"] = setuptools
    return found


def modules_of(requirements):
    names = {re.match(r"[\w-]+", requirement)[0].replace("-", "_") for requirement in requirements}
    return {MODULE.get(name, name) for name in names}


def imports_by_extra(source):
    """Yields (top-level third-party module, its extra): None where the import stands under no `with extra(...)`, and
    "caught" in a `try`, which then says in its own words what is missing."""

    def walk(node, guard):
        if isinstance(node, ast.With) and isinstance(call := node.items[0].context_expr, ast.Call):
            if isinstance(call.func, ast.Name) and call.func.id == "extra":
                guard = ast.literal_eval(call.args[0])
        elif isinstance(node, ast.Try):
            guard = "caught"
        elif isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], guard) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module.partition(".")[0], guard)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, guard)

    own = {*sys.stdlib_module_names, "dp_rmt"}
    return [(module, guard) for module, guard in walk(ast.parse(source), None) if module not in own]


def faults(source, packaging, gated=()):
    """The imports that would end in a bare "No module named ..." where only the core is installed."""
    core = modules_of(packaging["install_requires"])
    return [
        f"{module} under {guard}"
        for module, guard in imports_by_extra(source)
        if module not in core
        and module not in gated
        and guard != "caught"
        and module not in modules_of(packaging["extras_require"].get(guard, ()))
    ]


def test_every_import_is_of_the_core_or_under_its_extra(packaging):
    found = {}
    for path in PACKAGE.rglob("*.py"):
        # The door of dp_rmt.finetuning looks for all of its extra before anything in it is loaded. A worker of
        # submitit is started by submitit.
        in_finetuning = path.is_relative_to(PACKAGE / "finetuning")
        gated = {*modules_of(packaging["extras_require"]["finetune"]), "submitit"} if in_finetuning else ()
        if wrong := faults(path.read_text(encoding="utf-8"), packaging, gated):
            found[str(path.relative_to(PACKAGE))] = wrong
    assert found == {}


def test_planted_faults_are_found(packaging):
    assert faults("import tqdm", packaging) == ["tqdm under None"]
    assert faults("def f():\n    from transformers import AutoConfig", packaging) == ["transformers under None"]
    assert faults("with extra('report'):\n    import tqdm", packaging) == ["tqdm under report"]
    assert faults("with extra('finetune'):\n    import tqdm\nimport numpy.linalg", packaging) == []


def test_the_program_looks_for_all_of_its_extra(packaging):
    assert set(finetuning.MODULES) == modules_of(packaging["extras_require"]["finetune"])


def test_all_is_all_that_a_user_can_want(packaging):
    extras = packaging["extras_require"]
    wanted = {
        name for name in extras if name not in {"all", "test", "oracle", "peers", "peers-torch", "cuda", "tpu", "docs"}
    }
    assert set(extras["all"]) == {requirement for name in wanted for requirement in extras[name]}
    assert set(extras["finetune"]) <= set(extras["test"])


def test_versions_agree(packaging):
    assert packaging["version"] == dp_rmt.__version__
    citation = (PACKAGE.parent / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", citation, re.MULTILINE) == [dp_rmt.__version__]


def test_a_missing_package_names_the_command():
    command = r"needs no_such_package, which is not installed: pip install 'dp_rmt\[report\]'"
    with pytest.raises(ModuleNotFoundError, match=command) as raised, extra("report"):
        import no_such_package.inside  # noqa: F401
    assert raised.value.name == "no_such_package"
    with pytest.raises(ModuleNotFoundError, match=r"needs no_such_package, nor_this, which are not .*'dp_rmt\[all\]'"):
        check_installed("all", ["no_such_package", "numpy", "nor_this"])
    check_installed("all", ["numpy"])


def test_a_fault_of_its_own_is_not_blamed_on_an_extra():
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'dp_rmt.misspelt'$"), extra("report"):
        import dp_rmt.misspelt  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name 'misspelt'"), extra("report"):
        from numpy import misspelt  # noqa: F401
