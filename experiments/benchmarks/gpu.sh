#!/usr/bin/env bash
# What private steps and denoising cost on one NVIDIA GPU: records in experiments/benchmarks/results/, in
# step/ and denoiser/, named after the device.
#   pip install -e ".[cuda,peers,peers-torch]" && experiments/benchmarks/gpu.sh
# A batch that does not fit is shown as such; the largest that does is the last line of each model that has numbers.
set -uo pipefail
cd "$(dirname "$0")/../.."
export XLA_PYTHON_CLIENT_MEM_FRACTION=.95

for batch_size in 128 256 512 1024; do
  python -m experiments.benchmarks.step.main --model=roberta_base --dtype=bfloat16 --batch_size=$batch_size \
    --sequence_length=128 --microbatch_sizes=16,64 --torch --repeats=20
done
for model in llama_1024 llama_1024_lora; do
  for batch_size in 16 64; do
    python -m experiments.benchmarks.step.main --model=$model --dtype=bfloat16 --batch_size=$batch_size \
      --sequence_length=512 --microbatch_sizes=2,8 --repeats=20
  done
done
for model in qwen3_4b qwen3_4b_lora; do
  for batch_size in 4 16; do
    python -m experiments.benchmarks.step.main --model=$model --dtype=bfloat16 --batch_size=$batch_size \
      --sequence_length=512 --arms=bookkeeping,ghost --repeats=20
  done
done
for model in roberta_base minilm; do
  python -m experiments.benchmarks.denoiser --model=$model --repeats=20
done
python -m experiments.benchmarks.step.main --model=roberta_base --dtype=bfloat16 --batch_size=1024 \
  --sequence_length=128 --microbatch_sizes=128 --updates=subspace,gram --repeats=20
