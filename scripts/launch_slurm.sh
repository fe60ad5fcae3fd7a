#!/usr/bin/env bash
# Several nodes by Slurm, one process for each GPU, as jax.distributed expects it there; it finds the others by itself.
#
#   sbatch --partition=NAME --nodes=2 scripts/launch_slurm.sh configs/NAME.py DIR [--config.mesh.fsdp=-1 ...]
#
# DIR must be on a file system that all nodes share. What sbatch is given on its command line goes before these lines:
#SBATCH --job-name=dp_rmt
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# Two minutes before the time is up, and on preemption, every process gets SIGTERM: it saves a checkpoint and ends.
#SBATCH --signal=TERM@120
# The job then goes back into the queue and resumes, its log continued.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
set -euo pipefail
# Slurm runs a copy of this file; the job begins in the folder that sbatch was called in.
cd "${SLURM_SUBMIT_DIR:?this is a batch script: give it to sbatch}"

if (($# < 2)); then
  echo "usage: sbatch [OPTIONS] $0 CONFIG WORKDIR [--config.KEY=VALUE ...]" >&2
  exit 2
fi
config="$1" workdir="$2"
shift 2

export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda}"
status=0
# --wait: when one process has ended, the others have five minutes to notice and to end, too.
srun --wait=300 "${PYTHON:-python}" -m experiments.finetune --config="$config" --workdir="$workdir" \
  --coordinator_address=auto "$@" || status=$?

# 143 is 128 + SIGTERM: stopped by the warning, with a checkpoint, before the last step.
if ((status == 143)); then
  if ((${SLURM_RESTART_COUNT:-0} >= ${MAX_RESTARTS:-50})); then
    echo "given up after ${SLURM_RESTART_COUNT:-0} restarts" >&2
    exit 1
  fi
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
