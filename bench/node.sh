#!/usr/bin/env bash
# bench/node_layer.py on one 8-GPU node, on two, or as a dry run on any machine.
#
#   bench/node.sh                                          one node, 8 ranks
#   bench/node.sh --nodes 2 --node-rank 0 --head HOST      two nodes: the same on both, with
#   bench/node.sh --nodes 2 --node-rank 1 --head HOST        HOST the name of node 0
#   bench/node.sh --dry-run [--nodes 2]                    ranks of the host lane, here, no GPU
#
#   --nodes N            1 or 2; default 1
#   --node-rank R        which of the nodes this is, from 0; 0 prints and writes --json
#   --head HOST          where node 0 runs
#   --port P             of the rendezvous on the head node; default 29400
#   --ranks-per-node N   default 8
#   --dry-run            all nodes are processes of this machine; each node is a feplb domain of its
#                        own (FEPLB_DOMAIN), as hosts would be
#   --help
#
# Whatever else is given goes to bench/node_layer.py: --quick --json FILE --cpu --hidden N ...
# PYTHON chooses the interpreter (default: .venv/bin/python, else python3). If nodes do not find
# each other by their names, set GLOO_SOCKET_IFNAME to the network they share.
# Ends with 0, with the status of the first node that failed, or with 128 + a signal's number.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
if [[ -z ${PYTHON:-} && ! -x $python ]]; then python=python3; fi
# How long a torchrun may take to end its ranks (it kills those that take 30 s) before it is killed.
stop_s=${NODE_STOP_S:-40}
nodes=1 node_rank='' head='' port=29400 ranks=8 dry_run='' rest=()

refuse() {
  echo "node.sh: $1 (see --help)" >&2
  exit 2
}

number() { # number OPTION VALUE LEAST MOST
  [[ $2 =~ ^(0|[1-9][0-9]{0,4})$ ]] && (($2 >= $3 && $2 <= $4)) || refuse "$1 $2, expected $3 to $4"
}

read_arguments() {
  while (($#)); do
    case $1 in
      --nodes | --node-rank | --head | --port | --ranks-per-node)
        (($# > 1)) || refuse "$1 needs a value"
        case $1 in
          --nodes) nodes=$2 ;;
          --node-rank) node_rank=$2 ;;
          --head) head=$2 ;;
          --port) port=$2 ;;
          --ranks-per-node) ranks=$2 ;;
        esac
        shift
        ;;
      --dry-run) dry_run=1 ;;
      --help | -h)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
      *) rest+=("$1") ;;
    esac
    shift
  done
  number --nodes "$nodes" 1 2
  number --port "$port" 1 65535
  number --ranks-per-node "$ranks" 1 64
  if [[ $dry_run ]]; then
    [[ -z $node_rank$head ]] || refuse "--dry-run starts all nodes: no --node-rank, no --head"
  elif ((nodes > 1)); then
    [[ $head && $node_rank ]] || refuse "--nodes $nodes needs --head HOST and --node-rank R"
  fi
  number --node-rank "${node_rank:-0}" 0 $((nodes - 1))
}

set_environment() {
  # The ranks are the parallelism: a node's cores divided among them, not each rank on all of them.
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  # The host lane's tensors are malloc's. Kept memory spares every step the page faults, as an
  # allocator of tensors does.
  export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0}
  export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-1099511627776}
  # Megatron wants CUDA_DEVICE_MAX_CONNECTIONS=1 with TP or CP before Blackwell: one queue for
  # kernels and copies, where a waiting copy holds up GEMMs. Then copies get queues of their own;
  # feplb refuses less.
  if [[ ${CUDA_DEVICE_MAX_CONNECTIONS:-} == 1 ]]; then
    export CUDA_DEVICE_MAX_COPY_CONNECTIONS=${CUDA_DEVICE_MAX_COPY_CONNECTIONS:-8}
  fi
  if [[ $dry_run ]]; then
    rest+=(--cpu)
    # The machine's own name need not resolve, nor need there be a network.
    export GLOO_SOCKET_IFNAME=lo
  fi
}

launch() { # launch TORCHRUN_ARGUMENTS...: in a session of its own, so that Ctrl-C comes here alone
  setsid "$python" -m torch.distributed.run --nproc-per-node "$ranks" "$@" \
    "$root/bench/node_layer.py" "${rest[@]}" &
}

# Static: the ranks of node R follow those of node R - 1, so rank 0 prints on the head node.
launch_of_two() { # launch_of_two NODE_RANK HEAD PORT
  launch --rdzv-backend static --rdzv-endpoint "$2:$3" --rdzv-conf timeout=300 \
    --nnodes "$nodes" --node-rank "$1" --rdzv-id "feplb-node-$3"
}

free_port() {
  "$python" -c '
import socket
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    print(s.getsockname()[1])'
}

run() {
  if ((nodes == 1)); then
    launch --standalone
    wait_for 1
  elif [[ $dry_run ]]; then
    port=$(free_port)
    for ((node = 0; node < nodes; node++)); do
      FEPLB_DOMAIN=node$node launch_of_two "$node" 127.0.0.1 "$port"
    done
    wait_for "$nodes"
  else
    launch_of_two "$node_rank" "$head" "$port"
    wait_for 1
  fi
}

# A torchrun that is asked ends its ranks; one that does not is killed with them.
stop() {
  trap '' INT TERM HUP
  local child running
  read -r -d '' -a running <<<"$(jobs -p)" || true
  ((${#running[@]})) || return 0
  kill -TERM "${running[@]}" 2>/dev/null || true
  SECONDS=0
  for child in "${running[@]}"; do
    while kill -0 "$child" 2>/dev/null && ((SECONDS < stop_s)); do sleep 0.1; done
    if kill -0 "$child" 2>/dev/null; then
      kill -KILL $(cat "/proc/$child/task/"*/children) "$child" 2>/dev/null || true
    fi
  done
  wait
}

wait_for() { # wait_for NUM_TORCHRUNS: the first that fails ends the waiting
  local i
  for ((i = 0; i < $1; i++)); do
    wait -n || return
  done
}

read_arguments "$@"
set_environment
# What no rank can run is told once, in one sentence, before there are ranks.
"$python" "$root/bench/node_layer.py" "${rest[@]}" --check-only $((nodes * ranks))
trap stop EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
run
