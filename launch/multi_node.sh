#!/usr/bin/env bash
# Several machines that reach each other over the network. Run the same command on each of them:
#
#   NODES=2 RDZV_HOST=10.0.0.1 launch/multi_node.sh --data cifar10 --out runs/cifar10 --resume
#
# What to set:
#   NODES       how many machines take part; or the least and the most of them, as in 1:4: the job goes on with
#               those that are left, or that came, from its last checkpoint (with --steps: --epochs depend on the ranks)
#   RDZV_HOST   name or address of one of them, on the network that all of them share
#   RDZV_PORT   a free port there                                    (29400)
#   GPUS        ranks on each machine                                (its GPUs, or 4 on the CPU)
#   RESTARTS    how often all ranks start again if one dies          (0, or 3 where NODES is a range)
#   JOB         a name, if several jobs use the same host and port   (gaf_ddp)
# Let --out be a folder that all machines share: rank 0, on whichever of them it starts, writes there.
#
# Where a machine has several networks, name the interface that leads to RDZV_HOST:
#   GLOO_SOCKET_IFNAME=eth0   without GPUs, and for the control messages with them
#   NCCL_SOCKET_IFNAME=eth0   with GPUs; NCCL_IB_DISABLE=1 keeps NCCL off InfiniBand, NCCL_DEBUG=INFO shows its choice
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

: "${NODES:?set it to the number of machines}"
: "${RDZV_HOST:?set it to the name or address of one of the machines}"
RDZV_PORT=${RDZV_PORT:-29400}
JOB=${JOB:-gaf_ddp}
[[ $NODES != *:* ]] || RESTARTS=${RESTARTS:-3}
gpus_here() { nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true; }
GPUS=${GPUS:-$(gpus_here)}
[[ $GPUS != 0 ]] || GPUS=4

# torchrun looks its own address up by host name, which fails on machines that call themselves 127.0.1.1.
# The address from which this machine would send to RDZV_HOST is sure; nothing is sent to find it out.
read -r host_address own_address < <(python3 - "$RDZV_HOST" "$RDZV_PORT" <<'PYTHON'
import socket, sys

family, kind, _, _, address = socket.getaddrinfo(sys.argv[1], int(sys.argv[2]), type=socket.SOCK_DGRAM)[0]
with socket.socket(family, kind) as probe:
    probe.connect(address)
    print(address[0], probe.getsockname()[0])
PYTHON
)
network=()
if [[ $own_address != 127.* && $own_address != ::1 ]]; then
  network+=(--local-addr "$own_address")
  [[ $own_address != "$host_address" ]] || network+=(--rdzv-conf is_host=1)
fi

# Else the ranks of machines that are left look for the store of a machine that went: torchrun keeps its first address.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" --max-restarts "${RESTARTS:-0}" \
  --rdzv-backend c10d --rdzv-id "$JOB" --rdzv-endpoint "$RDZV_HOST:$RDZV_PORT" "${network[@]}" \
  -m launch.train "$@"
