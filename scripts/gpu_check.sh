#!/usr/bin/env bash
# Everything that needs a GPU, in one go and under nine minutes: the tests marked `gpu`, then the benchmarks of GPU
# kernels, as JSON in an output folder.
#
#     scripts/gpu_check.sh [FOLDER]        FOLDER: where results go, by default build/gpu-check
#
# Runs from a checkout, without installing it: needs Python 3.11 or newer with a CUDA build of torch, transformers,
# cuda-core, NVRTC and pytest with hypothesis. Nothing is fetched. PYTHON names another interpreter.
set -uo pipefail
exec </dev/null

cd "$(dirname "$0")/.."
out="${1:-build/gpu-check}"
mkdir -p "$out"
python="${PYTHON:-python3}"
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
export GANGLINE_HOME="${GANGLINE_HOME:-build/gpu-home}"

status=0
step() {
  local seconds="$1" name="$2"
  shift 2
  printf '\n== %s\n' "$name"
  timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee "$out/$name.log" | tail -n 40
  local code="${PIPESTATUS[0]}"
  if [ "$code" -ne 0 ]; then
    echo "$name ended with $code" >&2
    status=1
  fi
}

step 20 machine "$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name(0))'
step 210 tests "$python" -m pytest -q --maxfail=5 -m gpu -p no:cacheprovider tests/kernels/cuda
step 270 samoyeds_gpu_layer "$python" benchmarks/samoyeds/gpu_layer.py --seconds 240 \
  --out "$out/samoyeds_gpu_layer.json" --table "$out/samoyeds_times.json"
exit "$status"
