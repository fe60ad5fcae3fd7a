#!/usr/bin/env bash
# A Cloud TPU slice of any size: the same program on every host, which find each other.
#
#   TPU=NAME ZONE=ZONE scripts/launch_tpu_pod.sh setup
#   TPU=NAME ZONE=ZONE scripts/launch_tpu_pod.sh run configs/NAME.py DIR [--config.mesh.fsdp=-1 ...]
#
# `setup` copies this checkout to every host and installs it there; `run` starts a run, or resumes it, in the foreground.
# DIR is a path on the hosts, on storage that all of them share (Filestore, or a bucket mounted by Cloud Storage FUSE).
set -euo pipefail
cd "$(dirname "$0")/.."

: "${TPU:?the name of the TPU, as in gcloud compute tpus tpu-vm list}" "${ZONE:?its zone}"
directory="${DIRECTORY:-dp_rmt}"
on_all=(--zone="$ZONE" --worker=all)

case "${1:-}" in
  setup)
    archive="$(mktemp -d)/dp_rmt.tar.gz"
    git archive --format=tar.gz --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$TPU:dp_rmt.tar.gz" "${on_all[@]}"
    gcloud compute tpus tpu-vm ssh "$TPU" "${on_all[@]}" --command="
      set -e
      mkdir -p '$directory' && tar -xzf dp_rmt.tar.gz -C '$directory' && cd '$directory'
      python3 -m venv .venv && .venv/bin/pip install --quiet --editable '.[finetune,tpu]'
      .venv/bin/python -c 'import jax; print(jax.__version__)'"
    ;;
  run)
    if (($# < 3)); then
      echo "usage: $0 run CONFIG WORKDIR [--config.KEY=VALUE ...]" >&2
      exit 2
    fi
    printf -v arguments ' %q' --config="$2" --workdir="$3" --coordinator_address=auto "${@:4}"
    # When one host fails, the others notice and end, too.
    gcloud compute tpus tpu-vm ssh "$TPU" "${on_all[@]}" \
      --command="cd '$directory' && JAX_PLATFORMS=tpu .venv/bin/python -m experiments.finetune$arguments"
    ;;
  *)
    echo "usage: $0 setup | run CONFIG WORKDIR [--config.KEY=VALUE ...]" >&2
    exit 2
    ;;
esac
