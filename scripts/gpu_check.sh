#!/usr/bin/env bash
# Everything that needs a GPU, in one go and under nine minutes: kernels compiled on all cores, the tests marked `gpu`,
# then the benchmarks of GPU kernels, as JSON in an output folder. Every part is a process of its own with its own time:
# a part that fails, hangs or takes the GPU's context with it leaves the others as they are.
#
#     scripts/gpu_check.sh [FOLDER]        FOLDER: where results go, by default build/gpu-check
#
# FOLDER then holds a log and, for tests, a JUnit file for each part, samoyeds_gpu_layer_*.json, samoyeds_gpu_model_*.json
# (whole models, at 1 and 16 sequences, and the largest batch), samoyeds_times.json
# (what the dispatcher's table should be) and summary.json: exit code and seconds of every part.
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

deadline=525
status=0
summary=""
step() {
  local seconds="$1" name="$2" left=$((deadline - SECONDS)) start="$SECONDS" code
  shift 2
  ((seconds > left)) && seconds="$left"
  printf '\n== %s\n' "$name"
  if ((seconds < 10)); then
    echo "no time left" && code=-1
  else
    timeout --kill-after=5 "$seconds" "$@" 2>&1 | tee "$out/$name.log" | tail -n 25
    code="${PIPESTATUS[0]}"
  fi
  summary+="${summary:+, }{\"part\": \"$name\", \"code\": $code, \"seconds\": $((SECONDS - start))}"
  echo "[$summary]" >"$out/summary.json"
  if [ "$code" -ne 0 ]; then
    echo "$name ended with $code" >&2
    status=1
  fi
}
gpu_tests() {
  local seconds="$1" name="$2"
  shift 2
  step "$seconds" "$name" "$python" -m pytest -q --maxfail=8 -m gpu -p no:cacheprovider --junitxml="$out/$name.xml" "$@"
}
layer() {
  step "$1" "samoyeds_gpu_layer_$2" "$python" benchmarks/samoyeds/gpu_layer.py --shape "$2" --seconds "$(($1 - 15))" \
    --out "$out/samoyeds_gpu_layer_$2.json" --table "$out/times_$2.json"
}

model() {
  step "$1" "samoyeds_gpu_model_${2%%:*}" "$python" benchmarks/samoyeds/gpu_model.py --shape "$2" --rounds 5 --seconds "$(($1 - 30))" \
    --out "$out/samoyeds_gpu_model_${2%%:*}.json"
}

step 20 machine "$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name(0))'
step 100 compile "$python" scripts/gpu_compile.py
gpu_tests 90 tests_mma tests/kernels/cuda/test_gpu.py -k "not wgmma"
gpu_tests 60 tests_wgmma tests/kernels/cuda/test_gpu.py -k wgmma
gpu_tests 40 tests_model tests/runtime/test_gpu_experts.py
layer 45 Mixtral-8x7B
layer 45 OLMoE-1B-7B
model 90 olmoe-1b-7b
model 70 mixtral-8x7b:8
layer 35 Qwen2-MoE-A2.7B
layer 35 DeepSeek-MoE-16B
layer 35 MiniCPM-MoE-8x2B
layer 35 Mixtral-8x22B
step 10 table "$python" -c '
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
entries = [entry for path in sorted(folder.glob("times_*.json")) for entry in json.loads(path.read_text())]
(folder / "samoyeds_times.json").write_text(json.dumps(entries, indent=1) + "\n")
print(len(entries), "entries")
' "$out"
exit "$status"
