#!/usr/bin/env bash
# What needs a GPU, in two calls of less than ten minutes each on a bare machine.
#
#   bash bench/gpu.sh prepare       # before, without a GPU: commit, Triton's cache, library
#   bash bench/gpu.sh correctness   # at most 420 s: does it load, run, and compute what it should
#   bash bench/gpu.sh speed         # at most 300 s, alone on the device: benchmarks, then memcheck
#
#   bash bench/gpu.sh correctness --dry   # on a CPU: the same environment, every part starts
#
# Results and one archive of all logs go to $OUT (build/gpu/out). A part may use the seconds that the
# parts before it have left over; what it has not done by then is cut off and named. build/gpu/ is
# used where it is there; nothing is needed from a network. A library that had to be built comes back
# with the results: put it into build/gpu/ for the next call. PYTHON names the interpreter; Triton's
# cache serves only the same Python and Triton.
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
  mkdir -p "$prepared"
  commit_of_git > "$prepared/commit" || return
  hash_of csrc setup.py fastkd bench tests > "$prepared/sources"
  PYTHONPATH=$PWD "$python" bench/triton_cache.py --output "$prepared/triton_cache.tar.xz" || return
  "$python" -c 'import platform, triton
print("Triton cache for Python", platform.python_version(), "and Triton", triton.__version__)'
  if build --build-lib "$prepared/lib"; then
    mv "$prepared"/lib/fastkd/_C*.so "$prepared/_C.abi3.so"
    hash_of csrc setup.py > "$prepared/library_sources"
  else
    echo "the library does not build here: correctness will build it, and have 110 s less"
  fi
  rm -rf "$prepared/lib" "$prepared/out"
  echo "carry: $prepared ($(du -sh "$prepared" | cut -f 1))"
}

commit_of_git() { git describe --always --abbrev=40 --exclude='*' --dirty=" with changes" 2> /dev/null; }

hash_of() { # of the sources in files and folders
  find "$@" -type f ! -name '*.pyc' ! -name '*.so' ! -name '_not_built.txt' ! -path '*/results/*' -print0 |
    LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c 1-64
}

build() { # build ARGUMENT...: the library, for Hopper
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a} FASTKD_BUILD=cuda MAX_JOBS=$(nproc) \
    "$python" setup.py --quiet build_ext --force "$@"
}

# The calls: `part NAME SECONDS COMMAND...`, the seconds at most 420 and 300 in all.

correctness() {
  limit=420
  part versions 10 versions
  part library 110 library
  part first_contact 90 "$python" bench/first_contact.py --device "$device" --seconds 78 \
    --output "$output/first_contact.json" ${dry:+--smoke --jobs 2}
  part gpu_tests 70 gpu_tests
  part operator_tests 60 operator_tests "not slow"
  part trainer_tests 45 trainer_tests
  part slow_tests 35 operator_tests slow
}

speed() {
  limit=300
  part versions 10 versions
  part library 15 prepared_library
  part lift_kd 55 benchmark lift_kd triton cuda
  part spectrum 25 benchmark spectrum cuda
  part feature_kd 30 benchmark feature_kd triton cuda
  part second_moment 20 benchmark second_moment triton
  part train_step 110 benchmark train_step
  part memcheck 35 memcheck
}

versions() {
  echo "commit ${FASTKD_COMMIT:-UNKNOWN: set FASTKD_COMMIT, or run prepare}"
  echo "Triton's cache: $(find "$TRITON_CACHE_DIR" -mindepth 1 -maxdepth 1 | wc -l) entries"
  [ -n "$dry" ] || nvidia-smi --query-gpu=name,driver_version,memory.used --format=csv,noheader || return
  "$python" -m fastkd env
}

library() { # as it was prepared, or built here
  if [ -z "$dry" ]; then
    rm -f fastkd/_C*.so
    if [ "$(cat "$prepared/library_sources" 2> /dev/null)" = "$(hash_of csrc setup.py)" ]; then
      prepared_library && return
    fi
    rm -f fastkd/_C*.so
    build --inplace && cp fastkd/_C*.so "$output/_C.abi3.so"
  fi
  library_loads
}

prepared_library() {
  [ -n "$dry" ] || cp "$prepared/_C.abi3.so" fastkd/ || return
  library_loads
}

library_loads() {
  if [ -n "$dry" ]; then
    "$python" -m fastkd env | grep "CUDA library"
    return
  fi
  "$python" -c 'import sys, torch
from fastkd.ops.backend import extension
reason = extension().error or extension().why_not_on(torch.device("cuda", 0))
print(reason or "the library loads and covers this GPU")
sys.exit(reason is not None)'
}

gpu_tests() { # a process per operator and backend: what one does to the GPU costs no other
  local operator backend shard
  for operator in lift_kd feature_kd spectrum second_moment; do
    for backend in triton cuda torch; do
      case $operator-$backend in spectrum-triton | second_moment-cuda) continue ;; esac
      tests "$operator.$backend" --backends "$backend" "tests/ops/test_${operator}_gpu.py"
    done
  done
  for shard in 0 1 2 3; do
    tests "losses.$shard" --shard "$shard/4" tests/losses/test_losses_gpu.py
  done
  wait_for_tests
}

operator_tests() { # operator_tests MARK: kernels only; what operators do on a CPU needs no GPU
  local operator files=()
  for operator in conformance lift_kd lift_kd_cuda feature_kd spectrum spectrum_cuda second_moment sep; do
    files+=("tests/ops/test_$operator.py")
  done
  if [ -n "$dry" ]; then # a test or two
    tests 0 -m "$1" --backends triton,cuda --shard 7/700 "${files[@]}"
    wait_for_tests
  else
    shards 14 -m "$1" --backends triton,cuda "${files[@]}"
  fi
}

trainer_tests() { # as users run it: with the self-checks
  unset FASTKD_SELF_CHECK
  shards 8 tests/training/test_train_gpu.py
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
  local log=$logs/$name.$1.log
  shift
  OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 "$python" -m pytest -v --tb=short \
    -p no:cacheprovider -p tests.harness.as_it_goes "$@" > "$log" 2>&1 &
  started+=("$!")
  ran+=("$log")
}

wait_for_tests() {
  local status=0 index code
  for index in "${!started[@]}"; do
    wait "${started[$index]}"
    code=$?
    # 5: no test is left in this share of few
    [ "$code" -eq 0 ] || { [ "$code" -eq 5 ] && [ -n "$dry" ]; } || status=1
    printf '%-28s %s\n' "$(basename "${ran[$index]}" .log)" "$(tail -n 1 "${ran[$index]}")"
  done
  return "$status"
}

benchmark() { # benchmark NAME BACKEND...: rows are written as they are measured
  local operator=$1 status=0 backend
  "$python" "bench/$operator.py" --device "$device" --output "$output/${operator}_$gpu.json" \
    $([ -n "$dry" ] && echo --smoke || echo --quick) || status=$?
  shift
  for backend in "$@"; do
    [ -n "$dry" ] || grep -q "fastkd ($backend)" "$output/${operator}_$gpu.json" ||
      { echo "no row of fastkd ($backend)"; status=1; }
  done
  return "$status"
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
  local log=$logs/$name.log left=$((until - SECONDS)) status result=passed
  [ "$left" -ge 1 ] || left=1
  printf '\n== %s (at %s s, until %s s) ==\n' "$name" "$SECONDS" "$until"
  started=() ran=()
  ("$@") > "$log" 2>&1 &
  running=$!
  (sleep "$left" && touch "$work/cut_off" && kill -TERM -- "-$running" && sleep 2 &&
    kill -KILL -- "-$running") > /dev/null 2>&1 &
  watch=$!
  wait "$running"
  status=$?
  end_group "$watch"
  end_group "$running"
  running='' watch=''
  [ "$status" -eq 0 ] || result="FAILED (exit $status)"
  [ ! -e "$work/cut_off" ] || result="FAILED (cut off at $until s)"
  rm -f "$work/cut_off"
  grep -v '^USDT' "$log" | tail -n 45 | cut -c 1-160 # USDT: torch's profiler
  [ "$result" = passed ] || show_failures
  printf '%-16s %-28s %4s s\n' "$name" "$result" "$SECONDS" >> "$summary"
  [ "$result" = passed ] || failures=$((failures + 1))
  archive
}

end_group() { # TERM, a moment, KILL: nothing of a part may run beside the next
  {
    local tries
    kill -TERM -- "-$1"
    for ((tries = 0; tries < 15; tries++)); do
      kill -0 -- "-$1" || break
      sleep 0.1
    done
    kill -KILL -- "-$1"
    wait "$1"
  } 2> /dev/null
}

show_failures() {
  local log
  for log in "$logs/$name".*.log; do
    [ -e "$log" ] || return 0
    printf '%-28s %s\n' "$(basename "$log" .log)" "$(tail -n 1 "$log" | cut -c 1-120)"
  done
  grep -h -A 3 "^FAILED" "$logs/$name".*.log | head -n 40 | cut -c 1-160
}

archive() { tar -czf "$output/${call}_logs.tar.gz" -C "$logs" .; }

finish() {
  [ "$BASHPID" = "$$" ] || return # a child that is ended before it has forgotten this trap
  if [ -n "$running" ]; then
    printf '%-16s %-28s %4s s\n' "$name" "INTERRUPTED" "$SECONDS" >> "$summary"
    { kill -KILL -- "-$watch" "-$running" && wait; } 2> /dev/null
  fi
  archive
  printf '\n'
  cat "$summary"
  rm -rf "$work"
}

check_dry() { # what a dry run is for: parts start, files and seconds are within their limits
  local files
  files=$(find "$output" -type f | wc -l)
  [ "$files" -le 7 ] || { echo "$files files in $output: at most 8 come back, one a library"; return 1; }
  [ -z "$(find "$output" -type f -size +16M)" ] || { echo "a file is over 16 MiB"; return 1; }
  [ "$until" -le "$limit" ] || { echo "the limits add up to $until s, over $limit"; return 1; }
  echo "dry run: $files files, $until s in all"
}

case $call in
  prepare) prepare; exit ;;
  correctness | speed) ;;
  *) sed -n '2,18s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac

set -m # every part is a process group, so that it ends whole
work=$(mktemp -d)
logs=$work/logs summary=$work/logs/summary.txt running='' watch='' failures=0
[ -z "$dry" ] || output=${OUT:-$work/out}
mkdir -p "$output" "$logs" "$work/triton"
trap finish EXIT
trap '[ "$BASHPID" != "$$" ] || exit 143' TERM INT
: > "$summary"

export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
export FASTKD_REQUIRE=cuda,triton,library # what is missing fails its tests here
export FASTKD_UNPROVEN=1                  # this is where kernels are proven
export FASTKD_SELF_CHECK=0                # the tests compare more
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a}
export TRITON_CACHE_DIR=$work/triton TORCHINDUCTOR_CACHE_DIR=$work/inductor
if [ -z "${FASTKD_COMMIT:-}" ] && ! FASTKD_COMMIT=$(commit_of_git); then
  FASTKD_COMMIT=$(cat "$prepared/commit" 2> /dev/null)
  [ "$(cat "$prepared/sources" 2> /dev/null)" = "$(hash_of csrc setup.py fastkd bench tests)" ] ||
    FASTKD_COMMIT+=" with changes since"
fi
export FASTKD_COMMIT
gpu=cpu
[ -n "$dry" ] ||
  gpu=$(timeout 20 nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr -c 'A-Za-z0-9\n' _ | tr A-Z a-z)
[ ! -e "$prepared/triton_cache.tar.xz" ] ||
  timeout 60 "$python" -m tarfile -e "$prepared/triton_cache.tar.xz" "$TRITON_CACHE_DIR"

pass=count until=0
"$call"
[ "$until" -le "$limit" ] || { echo "the limits of $call add up to $until s, over $limit"; exit 2; }
pass=run until=0 SECONDS=0
"$call"
[ -z "$dry" ] || check_dry || failures=$((failures + 1))
[ "$failures" -eq 0 ]
