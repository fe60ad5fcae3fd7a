#!/usr/bin/env bash
# What is worth knowing of one NVIDIA GPU, in allocations of at most 9 minutes: the same command again continues.
#
#   experiments/benchmarks/gpu.sh [--minutes=9] [--parts=a,b,c,d,e] [--results=FOLDER]
#   experiments/benchmarks/gpu.sh --rehearse        every part with tiny sizes on the CPU, before there is a GPU
#
# Parts: a correctness there, b private steps beside plain ones and peers, c the denoiser, d the update rules on SST-2,
# e E2E and decoding speed. One JSON file each, in runs/gpu/DEVICE, written after every job; on a machine that has
# forgotten its disk, put those files there and go on. Models and data lie in ../models and ../data, as in a bundle of
# scripts/offline_bundle.sh; docs/launch.md says how that is made.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec "${PYTHON:-python}" -m experiments.benchmarks.gpu.main "$@"
