#!/usr/bin/env bash
# One archive for a machine without a network: wheels for its platform, this project, models, data, and install.sh.
#
#   scripts/offline_bundle.sh --output=FILE.tar.xz --python=3.12 [--extras=finetune,cuda] \
#     [--model=NAME=FOLDER_OR_HUB_NAME ...] [--data=NAME=FOLDER_OR_TASK ...]
#
# Run it where there is a network, in an environment that has dp_rmt[finetune]; --help lists the options. There:
#   tar -xf FILE.tar.xz && dp_rmt-bundle/install.sh ENVIRONMENT
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# -P: the folder that it is called in may have other experiments.
exec "${PYTHON:-python}" -P -m experiments.offline_bundle.main "$@"
