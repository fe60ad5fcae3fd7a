#!/usr/bin/env bash
# Installs this bundle without a network.
#
#   ./install.sh ENVIRONMENT     into a new virtual environment
#   PYTHON=python3 ./install.sh  into that Python, which keeps what it has
#
# Every file is compared with SHA256SUMS first; with a file that differs, is missing, or is not listed, nothing is done.
set -euo pipefail
bundle="$(cd "$(dirname "$0")" && pwd)"
python="${PYTHON:-python3}"

refuse() {
  echo "install.sh: $*" >&2
  echo "Nothing was installed. Unpack the archive again, and compare its own SHA-256 with that of the builder." >&2
  exit 1
}

(cd "$bundle" && sha256sum --check --quiet --strict SHA256SUMS) >&2 || refuse "a file is not what was packed."
listed="$(sed -n "s|^[0-9a-f]*  wheels/||p" "$bundle/SHA256SUMS")"
for wheel in "$bundle"/wheels/*; do
  # No pipe: grep -q ends at its match, and what writes to it then fails.
  grep -qxF "${wheel##*/}" <<<"$listed" ||
    refuse "wheels/${wheel##*/} is not listed in SHA256SUMS."
done

wanted="$(<"$bundle/python-version.txt")"
found="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
if [[ "$found" != "$wanted" ]]; then
  echo "install.sh: the wheels are for Python $wanted, but $python is $found: put PYTHON=python$wanted in front" >&2
  exit 1
fi
if (($# > 0)); then
  "$python" -m venv "$1"
  python="$(cd "$1" && pwd)/bin/python"
fi
# --no-compile: Python compiles what it uses, when it first does, which is a small part.
"$python" -m pip install --quiet --no-index --no-compile --disable-pip-version-check \
  --find-links "$bundle/wheels" --requirement "$bundle/requirements.txt"
"$python" -I -c 'import importlib.metadata as m; print("installed dp_rmt", m.version("dp_rmt"))'
cat <<END
Run everything from $bundle/project with $python, for example
  cd $bundle/project && export HF_HUB_OFFLINE=1 HF_HOME=$bundle/data/huggingface
  $python -m experiments.finetune --config=configs/quickstart.py --workdir=runs/quickstart
Models are in $bundle/models and data in $bundle/data, by name: --config.model.path= and --config.data.path=.
END
