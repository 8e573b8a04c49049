#!/usr/bin/env bash
# SmolLM2's 2x child in vLLM on one or two GPUs, end to end, from an empty directory: promise, measured, texts, fp8.
#
#   benchmarks/gpu/smollm2_vllm.sh WORK [STAGE...]      all stages, or these; each says what it needs (in brackets)
#     library        a block library of PARENT and its scores
#     profile        vLLM's fit at PARENT's shapes: six architectures with random weights            vllm-GPU-SHAPES/
#     solve          the child of GOALS in MEMORY: the first that is reachable [library, profile]    architecture.json
#     child          its default export, which vLLM reads by puzzle's plug-in [solve]
#     heal           the same, healed [child]
#     bench_child    promised and measured, parent and child [child]                                 promise.csv
#     bench_healed   the same of the healed child, with the parent once more [heal]                  promise.csv
#     check          `serve-check` of the healed child [heal]                                        serve_check.json
#     answers        greedy answers of the parent and the healed child, by the chat template [heal]  answers-*.jsonl
#     fp8            the healed child in fp8, without and with scales of the cache [heal]            fp8_files.csv
#     fp8_kl         KL to the parent, of the child and the healed one, in bf16 and fp8 [heal]       fp8.csv
#     fp8_reference  log-probabilities and texts of both children in fp8 by our own forward [fp8]
#     fp8_vllm       the same in vLLM, compared [fp8_reference]                                      fp8_logprobs.csv
#
# GPU_A runs what is puzzle's, GPU_B what is vLLM's, both at once where they differ. What is in WORK is not done again, what was cut off
# goes on when it is called again; a stage that fails leaves those that do not need it alone. Nothing runs past END seconds after T0.
# Small results are copied to RESULTS all the while; stages.csv there has the seconds of every stage.
#
#   PARENT=SmolLM2-135M-Instruct DATA=text.jsonl SITE=/where/vllm/is/site GPU_A=0 GPU_B=1 END=540 benchmarks/gpu/smollm2_vllm.sh work
#
# puzzle runs from this checkout, as `python -m puzzle.cli` with it on PYTHONPATH; what it imports comes from PYTHON and from what
# PYTHONPATH has already. SITE: a folder with vLLM, for PYTHON; empty where PYTHON_OF_VLLM has it, an environment with puzzle-nas in it.
# CPUS_B: cores of GPU_B's processes, as taskset takes them: a model this small runs at the pace of vLLM's Python, which neighbours slow
# down. The rehearsal on a CPU, at the reference parent's shapes:
#
#   GPU=cpu GPU_A= GPU_B=-1 PARENT=examples/parent SHAPES=reference DATA=/usr/lib/python3 PYTHON_OF_VLLM=.engines/vllm/bin/python SLOW=5 \
#     END=3600 TOKENS=2k SEQ_LEN=128 BATCH=4 SCORE_SEQUENCES=2 PROFILE_ARGS="--batches 1,4,8 --contexts 32,64" DTYPE=float32 LONGEST=200 \
#     LIBRARY_ARGS="--attention kv1,none --ffn 0.5,none --layers 4-9 --validation-sequences 2 --calibration-sequences 2" SEQUENCES=2 \
#     INPUT_LEN=64 OUTPUT_LEN=32 MEMORY=60MB GOALS="3x 1.15x" HEAL_TOKENS=2k HEAL_BATCH=4 HEAL_ARGS="--validation-sequences 2" REPEATS=1 \
#     benchmarks/gpu/smollm2_vllm.sh /tmp/work
set -uo pipefail
cd "$(dirname "$0")/../.."

ALL=(library profile solve child heal bench_child bench_healed check answers fp8 fp8_kl fp8_reference fp8_vllm)
LANE_B=" profile bench_child bench_healed check answers fp8_vllm "
WORK=${1:?usage: smollm2_vllm.sh WORK [STAGE...]}
shift
: "${T0:=$(date +%s)}" "${END:=1800}"
: "${SLOW:=1}" # every stage may take so many times what it may on a GPU
: "${PYTHON:=python3}" "${PYTHON_OF_VLLM:=}" "${SITE:=}"
: "${PARENT:=SmolLM2-135M-Instruct}" "${DATA:?a text: directory, glob or file}" "${SHAPES:=smollm2-135m}"
: "${RESULTS:=$WORK/results}"
: "${GPU_A=0}" "${GPU_B=$GPU_A}" "${CPUS_B:=}"
: "${GPU:=}" # h100 or h200, as puzzle calls it; what nvidia-smi says when empty
: "${SEQ_LEN:=1024}"
# library
: "${TOKENS:=8M}" "${BATCH:=8}" "${SCORE_SEQUENCES:=128}" "${LIBRARY_ARGS:=}"
: "${PROFILE_ARGS:=}" "${PROFILE_SECONDS:=420}"
# child
: "${GOALS:=2x 1.75x 1.5x 1.3x}" "${MEMORY:=1GB}" "${INPUT_LEN:=1024}" "${OUTPUT_LEN:=256}" "${SOLVE_ARGS:=}"
: "${HEAL_TOKENS:=10M}" "${HEAL_BATCH:=32}" "${HEAL_LR:=1e-3}" "${HEAL_ARGS:=}"
: "${REPEATS:=5}" # of a bench; the median counts
# fp8
: "${SEQUENCES:=64}" "${LONGEST:=3000}" "${DTYPE:=bfloat16}" "${OF_FP8:=healed-fp8 healed-fp8-kv}" # held against vLLM

mkdir -p "$WORK"/{done,pending,logs,costs,promise/bench} "$RESULTS"
WORK=$(realpath "$WORK") RESULTS=$(realpath "$RESULTS")
PARENT=$([[ -d $PARENT ]] && realpath "$PARENT" || echo "$PARENT")
[[ -z $PYTHON_OF_VLLM ]] || PYTHON_OF_VLLM=$(realpath -s "$PYTHON_OF_VLLM")
LIBRARY=$WORK/library
if [[ -z $GPU ]]; then
  GPU=h100
  nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1 | grep -qi h200 && GPU=h200
fi
DEVICE=$([[ $GPU == cpu ]] && echo cpu || echo auto)
FIT=$WORK/costs/$GPU/vllm/$SHAPES
ENGINE=(--engine vllm --gpu "$GPU")
PYTHON_B=()
[[ -z $PYTHON_OF_VLLM ]] || PYTHON_B=(--python "$PYTHON_OF_VLLM")

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=true PYTHONUNBUFFERED=1
source benchmarks/gpu/vllm.sh
PATH_B=$PWD${SITE:+:$SITE}:$PYTHONPATH

left() { echo $((T0 + END - $(date +%s))); }

# within SECONDS COMMAND...: at most SLOW times as long, and not past END.
within() {
  local most=$(($1 * SLOW)) rest
  shift
  rest=$(left)
  if ((rest < 5)); then
    echo "the time is up: call again"
    return 75
  fi
  timeout -k 5 "$((most < rest ? most : rest))" "$@"
}

on_a() { within "$1" env CUDA_VISIBLE_DEVICES="$GPU_A" "${@:2}"; }
on_b() {
  local pinned=()
  [[ -z $CPUS_B ]] || pinned=(taskset -c "$CPUS_B")
  within "$1" env CUDA_VISIBLE_DEVICES="$GPU_B" PYTHONPATH="$PATH_B" "${pinned[@]}" "${@:2}"
}
puzzle_a() { on_a "$1" "$PYTHON" -m puzzle.cli "${@:2}"; }
puzzle_b() { on_b "$1" "$PYTHON" -m puzzle.cli "${@:2}"; }
with_plug_in() { PATH_B=$PATH_B:$PLUG_IN "$@"; }

# What is asked for, and not there yet, comes; anything else that is not there does not.
needs() {
  local one
  for one in "$@"; do
    while [[ -e $WORK/pending/$one ]]; do sleep 0.5; done
    [[ -e $WORK/done/$one ]] || { echo "needs $one, which is not done" && return 1; }
  done
}

library() {
  # shellcheck disable=SC2086
  puzzle_a 300 build-library "$PARENT" --data "$DATA" --tokens "$TOKENS" --seq-len "$SEQ_LEN" --batch-size "$BATCH" \
    --score-sequences "$SCORE_SEQUENCES" --device "$DEVICE" $LIBRARY_ARGS --out "$LIBRARY" || return
  [[ -e $LIBRARY/costs ]] || ln -s "$WORK/costs" "$LIBRARY/costs"
}

profile() {
  # shellcheck disable=SC2086
  puzzle_b "$PROFILE_SECONDS" profile --shapes "$SHAPES" "${ENGINE[@]}" "${PYTHON_B[@]}" --run $PROFILE_ARGS --out "$WORK/costs"
  local said=$?
  if ((said)) && grep -q "measured again" "$WORK/logs/profile.log"; then
    echo "all points are there, cut off while slow ones were measured again: fitted as it is"
    puzzle_b 60 profile "${ENGINE[@]}" --fit "$FIT/measured.csv"
    said=$?
  fi
  mkdir -p "$RESULTS/vllm-$GPU-$SHAPES"
  cp "$FIT"/{architectures.json,measured.csv,fit.json} "$RESULTS/vllm-$GPU-$SHAPES/"
  return $said
}

solve() {
  needs library profile || return
  local goal
  for goal in $GOALS; do
    # shellcheck disable=SC2086
    puzzle_a 120 solve "$LIBRARY" --throughput "$goal" --memory "$MEMORY" "${ENGINE[@]}" --shapes "$SHAPES" --input-len "$INPUT_LEN" \
      --output-len "$OUTPUT_LEN" $SOLVE_ARGS --out "$WORK/solution" || {
      grep -q -- "--throughput $goal cannot be met" "$WORK/logs/solve.log" || return
      echo "$goal in $MEMORY: not reached" && continue
    }
    echo "$goal in $MEMORY: solved"
    echo "$goal" >"$WORK/goal"
    cp "$WORK/solution/architecture.json" "$RESULTS/"
    return 0
  done
  return 1
}

child() {
  needs solve || return
  puzzle_a 120 export "$LIBRARY" "$WORK/solution" --force --out "$WORK/child"
}

heal() {
  needs child || return
  # shellcheck disable=SC2086
  puzzle_a 300 heal "$WORK/child" --teacher "$PARENT" --data "$DATA" --tokens "$HEAL_TOKENS" --seq-len "$SEQ_LEN" \
    --batch-size "$HEAL_BATCH" --lr "$HEAL_LR" --eval-every 50 --save-every 100 --device "$DEVICE" $HEAL_ARGS --out "$WORK/healed"
}

# bench_of CHECKPOINT: with the parent, whose random weights take as long as its own.
bench_of() {
  local name out=$WORK/promise/bench/$1-hf.json
  name=$1
  puzzle_b 180 bench "$WORK/$name" "${ENGINE[@]}" "${PYTHON_B[@]}" --with-parent --repeats "$REPEATS" --json >"$out.said" || return
  mkdir -p "$WORK/promise/children/$name"
  cp "$WORK/solution/architecture.json" "$WORK/promise/children/$name/"
  "$PYTHON" - "$out" "$SHAPES" "$(cat "$WORK/goal") in $MEMORY, $name" <<'PY' || return
import datetime, json, pathlib, sys

out, shapes, name = sys.argv[1:]
found = json.loads(pathlib.Path(out + ".said").read_text())
more = {"shapes": shapes, "name": name, "format": "hf", "date": datetime.date.today().isoformat()}
pathlib.Path(out).write_text(json.dumps(found | more))
print(json.dumps({who: found[who] for who in ("parent", "child", "speedup")}, indent=1))
PY
  "$PYTHON" benchmarks/serving/bench_promise.py table --work "$WORK/promise" --out "$RESULTS/promise.csv"
  cp "$out" "$RESULTS/bench-$name.json"
}
bench_child() { needs child && bench_of child; }
bench_healed() { needs heal && bench_of healed; }

check() {
  needs heal || return
  with_plug_in puzzle_b 240 serve-check "$WORK/healed" --engine vllm "${PYTHON_B[@]}" --json >"$WORK/serve_check.json"
  local said=$?
  [[ -s $WORK/serve_check.json ]] && cp "$WORK/serve_check.json" "$RESULTS/"
  return $said
}

vllm_b() { with_plug_in on_b "$1" "${PYTHON_OF_VLLM:-$PYTHON}" "${@:2}"; }

answers() {
  needs heal || return
  local said=0
  [[ -s $RESULTS/answers-parent.jsonl ]] || vllm_b 150 benchmarks/serving/chat_answers.py "$PARENT" --name parent --dtype "$DTYPE" \
    --out "$RESULTS/answers-parent.jsonl" || said=1
  vllm_b 150 benchmarks/serving/chat_answers.py "$WORK/healed" --name healed --dtype "$DTYPE" --out "$RESULTS/answers-healed.jsonl" || said=1
  return $said
}

fp8() {
  needs heal || return
  puzzle_a 120 export "$WORK/healed" --dtype fp8 --force --out "$WORK/healed-fp8" || return
  puzzle_a 120 export "$WORK/healed" --dtype fp8 --kv-dtype fp8 --data "$DATA" --device "$DEVICE" --force --out "$WORK/healed-fp8-kv" || return
  {
    echo "checkpoint,safetensors_bytes"
    for one in child healed healed-fp8 healed-fp8-kv; do
      echo "$one,$(cat "$WORK/$one"/*.safetensors | wc -c)"
    done
  } >"$RESULTS/fp8_files.csv"
}

fp8_kl() {
  needs heal || return
  on_a 240 "$PYTHON" benchmarks/quality/bench_fp8.py "$WORK/child" "$WORK/healed" --parent "$PARENT" --data "$DATA" \
    --sequences "$SEQUENCES" --seq-len "$SEQ_LEN" --device "$DEVICE" --out "$RESULTS/fp8.csv"
}

fp8_reference() {
  needs fp8 || return
  local one said=0
  for one in $OF_FP8; do
    [[ -s $WORK/$one.npz ]] || on_a 240 "$PYTHON" benchmarks/serving/fp8_logprobs.py reference "$WORK/$one" "$WORK/$one.npz" \
      --bf16 "$WORK/healed" --longest "$LONGEST" || said=1
  done
  return $said
}

fp8_vllm() {
  needs fp8_reference || return
  local one said=0
  for one in $OF_FP8; do
    grep -q "^$one," "$RESULTS/fp8_logprobs.csv" 2>/dev/null || vllm_b 240 benchmarks/serving/fp8_logprobs.py vllm "$WORK/$one" \
      "$WORK/$one.npz" --dtype "$DTYPE" --csv "$RESULTS/fp8_logprobs.csv" || said=1
  done
  return $said
}

stage() {
  local name=$1 begin said
  begin=$(date +%s)
  echo "== $name, $(left) s left"
  "$name" </dev/null >"$WORK/logs/$name.log" 2>&1
  said=$?
  ((said)) || touch "$WORK/done/$name"
  rm -f "$WORK/pending/$name"
  cp "$WORK/logs/$name.log" "$RESULTS/$name.log"
  echo "$name,$(($(date +%s) - begin)),$said,$(date -u +%FT%TZ)" >>"$RESULTS/stages.csv"
  echo "== $name: $(($(date +%s) - begin)) s, exit $said"
  ((said == 0)) || tail -3 "$WORK/logs/$name.log"
}

asked=("$@")
[[ $# -gt 0 ]] || asked=("${ALL[@]}")
for one in "${asked[@]}"; do
  [[ " ${ALL[*]} " == *" $one "* ]] || { echo "unknown stage $one" >&2 && exit 2; }
done
[[ -s $RESULTS/stages.csv ]] || echo "stage,seconds,exit,date" >"$RESULTS/stages.csv"
rm -f "$WORK"/pending/*
lane_a=() lane_b=()
for one in "${ALL[@]}"; do
  [[ " ${asked[*]} " == *" $one "* && ! -e $WORK/done/$one ]] || continue
  touch "$WORK/pending/$one"
  if [[ $GPU_A != "$GPU_B" && $LANE_B == *" $one "* ]]; then lane_b+=("$one"); else lane_a+=("$one"); fi
done
echo "GPU $GPU; puzzle's: ${lane_a[*]}; vLLM's beside it: ${lane_b[*]:-none}"
for one in "${lane_b[@]}"; do stage "$one"; done &
for one in "${lane_a[@]}"; do stage "$one"; done
wait
for one in "${asked[@]}"; do
  [[ -e $WORK/done/$one ]] || { echo "not done: $one" && exit 1; }
done
