"""One archive for a machine without a network: wheels, this project, models, data, licences, hashes and install.sh.

    scripts/offline_bundle.sh --output=FILE.tar.xz --python=3.12 --extras=finetune,cuda \\
        --model=roberta-base --data=sst2=SST-2

--model and --data take NAME=SOURCE, or SOURCE alone, whose last part is then the name. A model's source is a folder, a
name on the Hugging Face hub, or package:NAME/FOLDER; that of data is a folder or file, or a task that the hub has
(sst2, e2e, ...). docs/launch.md says how the archive is used.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from absl import app, flags

from dp_rmt.finetuning import command_line
from experiments.offline_bundle import archive, contents, licences, wheels

_OUTPUT = flags.DEFINE_string("output", None, "The archive: FILE.tar.xz, .tar.gz or .tar.", required=True)
_PYTHON = flags.DEFINE_string("python", wheels.THIS_PYTHON, "Version of Python on the machine.")
_MACHINE = flags.DEFINE_enum("machine", "x86_64", ["x86_64", "aarch64"], "Its processor; the system is Linux.")
_GLIBC = flags.DEFINE_string("glibc", "2.28", "Its C library: `ldd --version` there.")
_EXTRAS = flags.DEFINE_list("extras", ["finetune"], "Extras of dp_rmt to install; with NVIDIA GPUs finetune,cuda.")
_PACKAGES = flags.DEFINE_list("packages", [], "Further packages, such as pytest or opacus==1.6.0.")
_HAVE = flags.DEFINE_string("have", None, "What the machine's Python has: `pip freeze` there, or names, one a line.")
_MODELS = flags.DEFINE_multi_string("model", [], "NAME=SOURCE of a model; it will lie in models/NAME.")
_IN_HALF = flags.DEFINE_multi_string("model_in_half", [], "The same; its weights are kept as float16.")
_DATA = flags.DEFINE_multi_string("data", [], "NAME=SOURCE of data; it will lie in data/NAME.")


def main(argv: list[str]) -> None:
    """Collects the parts in a scratch folder, writes their hashes and the archive."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}; flags begin with --")
    try:
        output = Path(_OUTPUT.value).absolute()
        archive.compression(output)
        target = wheels.Target(_PYTHON.value, _MACHINE.value, _GLIBC.value)
        have = wheels.read_have(Path(_HAVE.value)) if _HAVE.value else {}
        with tempfile.TemporaryDirectory(prefix="dp_rmt-bundle-") as scratch:
            folder = Path(scratch) / archive.FOLDER
            contents.add_project(folder / "project")
            own = wheels.build_own(folder / "project", folder / "wheels")
            requirements = wheels.collect(own, _EXTRAS.value, _PACKAGES.value, target, have, folder / "wheels")
            for given, in_half in [(x, False) for x in _MODELS.value] + [(x, True) for x in _IN_HALF.value]:
                contents.add_model(given, folder / "models", in_half=in_half)
            for given in _DATA.value:
                contents.add_data(given, folder / "data")
            licences.add_licences(folder)
            archive.add_installer(folder, target.python, requirements)
            archive.write(folder, output)
            print(archive.summary(folder, output))
    except (ValueError, OSError, RuntimeError) as error:
        command_line.stop(error)


if __name__ == "__main__":
    command_line.run(main)
