#!/usr/bin/env bash
# Everything that wants a GPU, in one go: builds, asks feplb doctor, runs the GPU tests, then every
# bench of a GPU. Goes on after a part that fails, and says at the end which did.
#
#   bench/gpu.sh                      about eight minutes, few samples
#   bench/gpu.sh --full               as many samples as the benches think right, no limit overall
#   bench/gpu.sh --only tests         one part, for as long as all together may take; may be given
#                                     several times
#   bench/gpu.sh --skip tests         all but that; likewise
#   bench/gpu.sh --list               the parts, and how long each may take in seconds
#
# In slots of ten minutes: first --skip tests, then --only build --only tests.
#
# Writes PART.txt and PART.json under bench/results/GPU, named after the GPU. Where $OUT is set, they
# are packed there as GPU.tar.gz, beside GPU.txt (all output), anew after every part: few files, and
# none lost if the time runs out. Without a GPU: build/gpu-dry-run, and no part measures anything.
#
# PYTHON chooses the interpreter (default: .venv/bin/python, else python3). GPU_SH_TOTAL_S is how
# long all parts together may take without --full (default 530).
# Ends with 0; 1 if a part failed or ran out of time; 2 for wrong usage; 3 where there is no GPU.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
if [[ -z ${PYTHON:-} && ! -x $python ]]; then python=python3; fi
total_s=${GPU_SH_TOTAL_S:-530}
full='' only=() skip=()

parts=(build doctor tests engine_proof gemm_straggler copy_overlap layer_emulated submit_cost
  grouped_gemm permute ep_overhead layer_time sanitizer)
declare -A seconds=([build]=150 [doctor]=40 [tests]=200 [engine_proof]=60 [gemm_straggler]=60
  [copy_overlap]=60 [layer_emulated]=70 [submit_cost]=60 [grouped_gemm]=50 [permute]=30
  [ep_overhead]=30 [layer_time]=120 [sanitizer]=90)
# What shows the most; with --full all of them.
first_tests=(tests/test_gpu_compute.py tests/test_measure_tiles.py tests/test_grouped_gemm.py
  tests/test_swiglu_kernel.py tests/test_permute_kernel.py tests/test_rank_threads.py
  tests/test_gpu.py)

refuse() {
  echo "gpu.sh: $1 (see --help)" >&2
  exit 2
}

read_arguments() {
  while (($#)); do
    case $1 in
      --full) full=1 ;;
      --only | --skip)
        (($# > 1)) || refuse "$1 needs a part"
        [[ -n ${seconds[$2]:-} ]] || refuse "$1 $2, expected one of ${parts[*]}"
        if [[ $1 == --only ]]; then only+=("$2"); else skip+=("$2"); fi
        shift
        ;;
      --list)
        for part in "${parts[@]}"; do echo "$part ${seconds[$part]}"; done
        exit 0
        ;;
      --help | -h)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
      *) refuse "$1 is not known" ;;
    esac
    shift
  done
}

is_among() { # is_among WORD WORDS...
  local word=$1 other
  shift
  for other in "$@"; do [[ $word == "$other" ]] && return 0; done
  return 1
}

is_wanted() {
  ((${#only[@]} == 0)) || is_among "$1" "${only[@]}" || return 1
  ! is_among "$1" ${skip[@]+"${skip[@]}"}
}

gpu_name() { # empty where PyTorch has no GPU
  "$python" -c '
import torch
if torch.cuda.is_available():
    print(torch.cuda.get_device_name(0))' 2>/dev/null
}

# The command of a part; the words of `quick` are left out with --full.
command_of() {
  local quick=()
  if [[ ! $full ]]; then quick=(--quick); fi
  local json="$folder/$1.json"
  case $1 in
    build)
      MAX_JOBS=$(nproc) "$python" -m pip install --quiet --no-build-isolation --no-deps -e "$root"
      ;;
    doctor)
      "$python" -m feplb doctor --lane ce --json >"$json"
      "$python" -m feplb doctor --lane ce
      ;;
    tests)
      local files=("${first_tests[@]}")
      if [[ $full ]]; then files=(tests); fi
      "$python" -m pytest -m gpu -p no:cacheprovider --durations=10 "${files[@]}"
      ;;
    submit_cost)
      if [[ ! $gpu ]]; then
        echo "No CUDA device here: nothing was measured. (bench/submit_cost.py, run by itself,"
        echo "times feplb over a driver that stands in for one.)"
        return 0
      fi
      "$python" bench/submit_cost.py --json "$json" "${quick[@]}"
      ;;
    layer_time) "$python" bench/layer_time.py --lane ce --json "$json" "${quick[@]}" ;;
    *) "$python" "bench/$1.py" --json "$json" "${quick[@]}" ;;
  esac
}

pack() {
  [[ ${OUT:-} ]] || return 0
  tar -C "$(dirname "$folder")" -czf "$OUT/$slug.tar.gz" "$(basename "$folder")"
  cat "$folder"/*.txt >"$OUT/$slug.txt"
}

run_part() { # run_part PART: its status
  local limit=${seconds[$1]} left=$((total_s - SECONDS)) status
  if [[ $full ]]; then limit=$((10 * limit)); fi
  if ((${#only[@]})); then limit=$total_s; fi
  if [[ ! $full ]] && ((left < limit)); then limit=$left; fi
  if ((limit <= 0)); then
    echo "$1: no time was left for it" | tee "$folder/$1.txt"
    return 124
  fi
  echo
  echo "==== $1 (at most $limit s)"
  export -f command_of
  # A function needs a shell for timeout to run it in; what it uses goes along.
  full=$full gpu=$gpu folder=$folder root=$root python=$python tests="${first_tests[*]}" \
    timeout --kill-after=10 "$limit" bash -c \
    'read -r -a first_tests <<<"$tests"; command_of "$1"' bash "$1" 2>&1 |
    tee "$folder/$1.txt"
  status=${PIPESTATUS[0]}
  if ((status == 124 || status == 137)); then
    echo "$1: ended after $limit s" | tee -a "$folder/$1.txt"
  fi
  return "$status"
}

read_arguments "$@"
cd "$root" || exit 1
gpu=$(gpu_name)
if [[ $gpu ]]; then
  slug=$(tr -cs '[:alnum:]' '-' <<<"$gpu" | sed 's/^-*//;s/-*$//' | tr '[:upper:]' '[:lower:]')
  folder=$root/bench/results/$slug
else
  slug=gpu-dry-run
  folder=$root/build/$slug
  echo "no CUDA device here: a dry run, in which nothing is measured"
fi
if [[ ${OUT:-} ]]; then folder=$(mktemp -d)/$slug; fi
mkdir -p "$folder"
"$python" -c '
import sys, torch
print("python", sys.version.split()[0], "torch", torch.__version__, "cuda", torch.version.cuda)' |
  tee "$folder/0-machine.txt"
if command -v nvidia-smi >/dev/null; then nvidia-smi >>"$folder/0-machine.txt" 2>&1; fi
git rev-parse HEAD >>"$folder/0-machine.txt" 2>/dev/null || true

failed=()
for part in "${parts[@]}"; do
  is_wanted "$part" || continue
  run_part "$part"
  status=$?
  # The doctor says no go where there is no GPU, which is what a dry run is for.
  if ((status)) && [[ $gpu || $part != doctor ]]; then failed+=("$part (status $status)"); fi
  pack
done

echo
echo "results: ${OUT:-$folder}"
if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}" | tee -a "$folder/0-machine.txt"
  pack
  exit 1
fi
if [[ ! $gpu ]]; then
  echo "no GPU was there: nothing was measured"
  exit 3
fi
echo "all parts passed"
