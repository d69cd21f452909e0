#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build, tests, sanitizer, benchmarks, JSON.
#
#   bash bench/gpu.sh [PART...]      # all parts, or some of: prebuilt build environment tests
#                                    # sanitizer bench, or by their own names: tests_lift_kd
#                                    # bench_feature_kd ...
#
# Logs and JSON go to $OUT, or bench/results. No part may take more than five minutes, but for
# bench_train_step, which compiles CaiT-S24 five times: nine. The limits add up to 80, what is used to
# less than half. Benchmarks write what they have after every case.
# Uses the python3 on the PATH with the torch it has; installs nothing but fastkd itself, needs no
# network. PREBUILT=path/to/_C.abi3.so also shows that a library built elsewhere, against another
# torch, loads here and passes its tests. Goes on after a failed part and reports it at the end.
set -uo pipefail
cd "$(dirname "$0")/.."
output=${OUT:-bench/results}
wanted=" ${*:-prebuilt build environment tests sanitizer bench} "
mkdir -p "$output"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
export FASTKD_REQUIRE=cuda,triton,library # what is missing fails its tests here
export FASTKD_UNPROVEN=1                  # this is where kernels are proven
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(python3 -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if major >= 9 else ""))')}
failed=()
part() { # part GROUP NAME LIMIT_SECONDS COMMAND...
  local group=$1 name=$2 limit=$3
  shift 3
  [[ $wanted == *" $group "* || $wanted == *" $name "* ]] || return 0
  printf '\n== %s (%s s) ==\n' "$name" "$SECONDS"
  timeout "$limit" "$@" 2>&1 | tee "$output/$name.log" | tail -n 25
  local status=${PIPESTATUS[0]}
  [ "$status" -eq 0 ] || failed+=("$name (exit $status)")
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
if [ -n "${PREBUILT:-}" ] && [[ $wanted == *" prebuilt "* ]]; then
  rm -f fastkd/_C*.so && cp "$PREBUILT" fastkd/_C.abi3.so
  part prebuilt prebuilt 120 python3 -m pytest -x -p no:cacheprovider tests/ops/test_feature_kd.py -k "cuda and self_check"
  rm -f fastkd/_C*.so
fi
part build build 200 env FASTKD_BUILD=cuda python3 setup.py build_ext --inplace
part environment environment 30 python3 -m fastkd.environment
shards() { # shards COUNT TEST_FILE...: kernels compile on several cores
  local count=$1 status=0 pids=()
  shift
  for ((shard = 0; shard < count; shard++)); do
    FASTKD_SHARD=$shard/$count python3 -m pytest -q -p no:cacheprovider "$@" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
  return "$status"
}
export -f shards
for operator in lift_kd spectrum second_moment feature_kd; do
  files=tests/ops/test_$operator.py
  [ "$operator" != second_moment ] || files+=" tests/ops/test_sep.py"
  part tests "tests_$operator" 240 bash -c "shards 8 $files"
  part tests "tests_${operator}_gpu" 100 python3 -m pytest -p no:cacheprovider "tests/ops/test_${operator}_gpu.py"
done
part tests tests_extension 40 python3 -m pytest -p no:cacheprovider tests/ops/test_extension.py
part tests tests_losses 120 bash -c "shards 8 tests/losses"
part tests tests_losses_gpu 240 bash -c "shards 4 tests/losses/test_losses_gpu.py"
part tests tests_training 300 env OMP_NUM_THREADS=2 bash -c "shards 8 tests/training" # all, seeing CUDA
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    part sanitizer "sanitizer_$tool" 100 compute-sanitizer --tool "$tool" --error-exitcode 9 python3 bench/sanitize.py
  done
  part sanitizer sanitizer_triton 100 compute-sanitizer --tool memcheck --error-exitcode 9 python3 bench/sanitize.py --backend triton
fi
gpu=$(python3 -c 'import torch; print(torch.cuda.get_device_name().split()[1].lower())')
for bench in lift_kd spectrum second_moment feature_kd relations; do
  part bench "bench_$bench" 300 python3 "bench/$bench.py" --device cuda --output "$output/${bench}_$gpu.json"
done
part bench bench_train_step 540 python3 bench/train_step.py --device cuda --output "$output/train_step_$gpu.json"

printf '\n'
if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
echo "all parts passed; results in $output"
