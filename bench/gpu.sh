#!/usr/bin/env bash
# What needs a GPU, in two calls of less than ten minutes each on a bare machine.
#
#   bash bench/gpu.sh prepare       # before, without a GPU: library, Triton's cache, commit
#   bash bench/gpu.sh correctness   # at most 420 s: does it load, run, and compute what it should
#   bash bench/gpu.sh speed         # at most 300 s, alone on the device: benchmarks, then memcheck
#
#   bash bench/gpu.sh correctness --dry   # on a CPU: the same environment, every part starts
#
# Results and one archive of all logs go to $OUT (build/gpu/out). A part may use the seconds that the
# parts before it have left over; what it has not done by then is cut off and named. A prepared
# fastkd/_C.abi3.so and build/gpu/ are used where they are there; nothing is needed from a network.
# PYTHON names the interpreter; Triton's cache serves only the same Python and Triton.
set -uo pipefail
cd "$(dirname "$0")/.."
call=${1:-} dry=
[ "${2:-}" != --dry ] || dry=1
python=${PYTHON:-python3}
prepared=build/gpu
output=${OUT:-$prepared/out}
device=cuda
[ -z "$dry" ] || device=cpu

prepare() {
  set -e
  mkdir -p "$prepared"
  [ -e fastkd/_C.abi3.so ] ||
    TORCH_CUDA_ARCH_LIST=9.0a FASTKD_BUILD=cuda "$python" setup.py --quiet build_ext --inplace
  PYTHONPATH=$PWD "$python" bench/triton_cache.py --output "$prepared/triton_cache.tar.xz"
  git describe --always --abbrev=40 --exclude='*' --dirty=" with changes" > "$prepared/commit"
  "$python" -c 'import platform, triton
print("Triton cache for Python", platform.python_version(), "and Triton", triton.__version__)'
  echo "carry: fastkd/_C.abi3.so $prepared"
}

# The calls: `part NAME SECONDS COMMAND...`, the seconds at most 420 and 300 in all.

correctness() {
  limit=420
  part versions 15 versions
  part library 115 library
  part first_contact 90 "$python" bench/first_contact.py --device "$device" --seconds 85 \
    --output "$output/first_contact.json" ${dry:+--smoke --jobs 2}
  part gpu_tests 75 gpu_tests
  part operator_tests 75 operator_tests
  part trainer_tests 50 shards 8 tests/training/test_train_gpu.py
}

speed() {
  limit=300
  part versions 15 versions
  part lift_kd 55 benchmark lift_kd
  part spectrum 30 benchmark spectrum
  part feature_kd 30 benchmark feature_kd
  part second_moment 25 benchmark second_moment
  part train_step 110 benchmark train_step
  part memcheck 35 memcheck
}

versions() {
  [ -n "$dry" ] || nvidia-smi --query-gpu=name,driver_version,memory.used --format=csv,noheader
  [ -n "$FASTKD_COMMIT" ] || echo "WARNING: no commit; set FASTKD_COMMIT or run prepare"
  echo "commit $FASTKD_COMMIT; Triton's cache: $(find "$TRITON_CACHE_DIR" -maxdepth 1 | wc -l) entries"
  "$python" -m fastkd env
}

library() { # usable as it came, or built here
  local check='import sys, torch
from fastkd.ops.extension import extension
reason = extension().error or extension().why_not_on(torch.device("cuda", 0))
print(reason or "the library loads and covers this GPU")
sys.exit(reason is not None)'
  if [ -n "$dry" ]; then
    "$python" -m fastkd env | grep "CUDA library"
    return
  fi
  "$python" -c "$check" && return
  rm -f fastkd/_C*.so
  FASTKD_BUILD=cuda MAX_JOBS=16 "$python" setup.py --quiet build_ext --inplace && "$python" -c "$check"
}

gpu_tests() { # a process per operator and backend: what one does to the GPU costs no other
  local operator backend
  for operator in lift_kd feature_kd spectrum second_moment; do
    for backend in triton cuda torch; do
      case $operator-$backend in spectrum-triton | second_moment-cuda) continue ;; esac
      tests "$operator.$backend" --backends "$backend" "tests/ops/test_${operator}_gpu.py"
    done
  done
  local shard
  for shard in 0 1 2 3; do
    tests "losses.$shard" --shard "$shard/4" tests/losses/test_losses_gpu.py
  done
  wait_for_tests
}

operator_tests() { # kernels only: what the operators do on a CPU needs no GPU
  local names=(lift_kd feature_kd spectrum spectrum_cuda spectrum_measures second_moment sep)
  if [ -n "$dry" ]; then # a test or two each
    tests 0 --backends triton,cuda --shard 7/700 "${names[@]/#/tests/ops/test_}"
    wait_for_tests
  else
    shards 14 --backends triton,cuda "${names[@]/#/tests/ops/test_}"
  fi
}

shards() { # shards COUNT ARGUMENT...
  local count=$1 shard
  shift
  for ((shard = 0; shard < count; shard++)); do
    tests "$shard" --shard "$shard/$count" "$@"
  done
  wait_for_tests
}

tests() { # tests NAME ARGUMENT...: one pytest in the background, names and reasons as it goes
  local log=$logs/$name.$1.log arguments=() argument
  shift
  for argument; do
    [[ $argument != tests/*/test_* || $argument == *.py ]] || argument+=.py
    arguments+=("$argument")
  done
  OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 "$python" -m pytest -v --tb=short \
    -p no:cacheprovider -p tests.harness.as_it_goes "${arguments[@]}" > "$log" 2>&1 &
  started+=("$!")
  ran+=("$log")
}

wait_for_tests() {
  local status=0 index code
  for index in "${!started[@]}"; do
    wait "${started[$index]}"
    code=$?
    case $code in
      0 | 5) ;; # 5: this share of the tests is empty
      *) status=1 ;;
    esac
    printf '%-28s %s\n' "$(basename "${ran[$index]}" .log)" "$(tail -n 1 "${ran[$index]}")"
  done
  grep -h -A 3 "^FAILED" "${ran[@]}" | head -n 40
  return "$status"
}

benchmark() { # each writes its rows after every case
  "$python" "bench/$1.py" --device "$device" --output "$output/$1_$gpu.json" \
    $([ -n "$dry" ] && echo --smoke || echo --quick)
}

memcheck() {
  if [ -n "$dry" ]; then
    "$python" bench/sanitize.py --device cpu
  else
    compute-sanitizer --tool memcheck --error-exitcode 9 "$python" bench/sanitize.py
  fi
}

# How a call is run.

part() { # part NAME SECONDS COMMAND...
  name=$1
  until=$((until + $2))
  shift 2
  [ "$pass" = run ] || return 0
  local log=$logs/$name.log left=$((until - SECONDS)) status
  printf '\n== %s (at %s s, until %s s) ==\n' "$name" "$SECONDS" "$until"
  started=() ran=()
  ("$@") > "$log" 2>&1 &
  running=$!
  (sleep "$left" && kill -TERM -- "-$running" && sleep 3 && kill -KILL -- "-$running") 2> /dev/null &
  local watch=$!
  wait "$running"
  status=$?
  { kill -TERM -- "-$watch" && wait "$watch"; } 2> /dev/null
  running=
  grep -v '^USDT' "$log" | tail -n 25 | cut -c 1-160 # USDT: torch's profiler
  local result="passed"
  [ "$status" -eq 0 ] || result="FAILED (exit $status)"
  [ "$SECONDS" -lt "$until" ] || result="FAILED (cut off at $until s)"
  printf '%-16s %-28s %4s s\n' "$name" "$result" "$SECONDS" >> "$summary"
  [ "$result" = passed ] || failures=$((failures + 1))
  archive
}

archive() { tar -czf "$output/${call}_logs.tar.gz" -C "$logs" .; }

finish() {
  [ -z "$running" ] || kill -KILL -- "-$running" 2> /dev/null
  archive
  printf '\n'
  cat "$summary"
  rm -rf "$work"
}

check_dry() { # what a dry run is for: parts start, files and seconds are within their limits
  local files
  files=$(find "$output" -type f | wc -l)
  [ "$files" -le 8 ] || { echo "$files files in $output, at most 8 come back"; return 1; }
  [ -z "$(find "$output" -type f -size +16M)" ] || { echo "a file is over 16 MiB"; return 1; }
  [ "$until" -le "$limit" ] || { echo "the limits add up to $until s, over $limit"; return 1; }
  echo "dry run: $files files, $until s in all"
}

case $call in
  prepare) prepare; exit ;;
  correctness | speed) ;;
  *) sed -n '2,17s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac

set -m # every part is a process group, so that it ends whole
work=$(mktemp -d)
logs=$work/logs summary=$work/logs/summary.txt running='' failures=0
[ -z "$dry" ] || output=${OUT:-$work/out}
mkdir -p "$output" "$logs" "$work/triton"
trap finish EXIT
trap 'exit 143' TERM INT
: > "$summary"

export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
export FASTKD_REQUIRE=cuda,triton,library # what is missing fails its tests here
export FASTKD_UNPROVEN=1                  # this is where kernels are proven
export FASTKD_SELF_CHECK=0                # the tests compare more
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a}
export TRITON_CACHE_DIR=$work/triton TORCHINDUCTOR_CACHE_DIR=$work/inductor
FASTKD_COMMIT=${FASTKD_COMMIT:-$(cat "$prepared/commit" 2> /dev/null ||
  git describe --always --abbrev=40 --exclude='*' --dirty=" with changes" 2> /dev/null)}
export FASTKD_COMMIT
gpu=cpu
if [ -z "$dry" ]; then
  gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name().split()[1].lower())')
fi
if [ -e "$prepared/triton_cache.tar.xz" ]; then
  "$python" -m tarfile -e "$prepared/triton_cache.tar.xz" "$TRITON_CACHE_DIR"
fi

pass=count until=0
"$call"
[ "$until" -le "$limit" ] || { echo "the limits of $call add up to $until s, over $limit"; exit 2; }
pass=run until=0
"$call"
[ -z "$dry" ] || check_dry || failures=$((failures + 1))
[ "$failures" -eq 0 ]
