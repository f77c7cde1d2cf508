#!/usr/bin/env bash
# One machine, one rank per GPU; without GPUs four ranks on the CPU.
#
#   launch/single_node.sh                                  the demonstration
#   launch/single_node.sh --data cifar10 --download        any option of launch.train
#   GPUS=2 launch/single_node.sh                           fewer ranks than there are GPUs
#   RESTARTS=3 launch/single_node.sh --out runs/1 --resume if a rank dies: all start again, from the last checkpoint
#
# Nothing has to be changed here. To see what NCCL does: NCCL_DEBUG=INFO.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

gpus_here() { nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true; }
GPUS=${GPUS:-$(gpus_here)}
[[ $GPUS != 0 ]] || GPUS=4

exec torchrun --standalone --nproc-per-node "$GPUS" --max-restarts "${RESTARTS:-0}" -m launch.train "$@"
