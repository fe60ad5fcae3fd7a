#!/usr/bin/env bash
# One machine with one or several NVIDIA GPUs: one process drives them all.
#
#   scripts/launch_gpu_node.sh configs/NAME.py DIR [--config.mesh.fsdp=-1 --config.data.path=DATA ...]
#
# The same command again resumes from the last checkpoint in DIR. Chosen GPUs: CUDA_VISIBLE_DEVICES=0,1 in front.
set -euo pipefail
cd "$(dirname "$0")/.."

if (($# < 2)); then
  echo "usage: $0 CONFIG WORKDIR [--config.KEY=VALUE ...]" >&2
  exit 2
fi
config="$1" workdir="$2"
shift 2

nvidia-smi --query-gpu=index,name,memory.total --format=csv || {
  echo "no NVIDIA GPU to be seen: is the driver installed?" >&2
  exit 1
}
# JAX takes three quarters of a GPU's memory unless told otherwise; nothing else runs here.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
# A run that should be on GPUs and falls back to the CPU would take weeks: refuse instead.
export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda}"
exec "${PYTHON:-python}" -m experiments.finetune --config="$config" --workdir="$workdir" "$@"
