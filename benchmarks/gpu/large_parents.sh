#!/usr/bin/env bash
# Scores and evaluation at the shapes of large parents, the screen's order, evaluation on two GPUs: from an empty directory.
#
#   benchmarks/gpu/large_parents.sh WORK STAGE...       stages, on one GPU but for the last; none needs another, but `screen` leaves a
#                                                       library that `evaluate_ranks` takes its child from:
#     scores_8b        Llama-3.1-8B, 32 x 12 candidates, 65,536 tokens; its first 8 layers before     large_parents.csv
#     screen           score --sub-block-screen: order against the exact scores, on PARENT            screen.csv
#     evaluate_70b     Llama-3.3-70B, all 80 layers where memory or disk hold 141 GB, else 28         large_parents.csv
#     evaluate_ranks   (two GPUs) evaluate on one and on two, one of two killed, started again        evaluate_ranks.csv
#
# With REPO_BASE, another checkout, `scores_8b` measures the 8 layers with it too and says how far its scores are from these. Random weights
# lie in LARGE: 24 GB for `scores_8b`, 142 GB for `evaluate_70b`, removed when it is done but for KEEP=1. Default: /dev/shm where it and
# memory have the room, else WORK. What a stage has written stays, results go to RESULTS as they come, and nothing runs beyond END seconds
# after T0 (date +%s): scores that were cut off go on when the stage is called again. Every capital below may be set from outside:
#
#   PARENT=SmolLM2-135M DATA=text.jsonl benchmarks/gpu/large_parents.sh /tmp/work scores_8b screen evaluate_70b
#   CUDA_VISIBLE_DEVICES=0,1 PARENT=SmolLM2-135M DATA=text.jsonl benchmarks/gpu/large_parents.sh /tmp/work evaluate_ranks
#
# Rehearsal on a CPU, two processes:   DEVICE=cpu PARENT=examples/parent DATA=/usr/lib/python3.11/email benchmarks/gpu/large_parents.sh ...
set -uo pipefail
cd "$(dirname "$0")/../.."

WORK=${1:?usage: large_parents.sh WORK STAGE...}
shift
: "${PYTHON:=python3}"
: "${PARENT:=HuggingFaceTB/SmolLM2-135M-Instruct}"
: "${DATA:=}"
: "${RESULTS:=$WORK/results}"
: "${DEVICE:=cuda}"
: "${REPO_BASE:=}"
: "${LIBRARY:=$WORK/library}" # of PARENT; built where there is none
: "${LARGE:=}"
: "${KEEP:=}"
: "${T0:=$(date +%s)}"
: "${END:=36000}"
if [[ $DEVICE == cuda ]]; then
  : "${EIGHT:=llama-3.1-8b}" "${SEVENTY:=llama-3.3-70b}" "${LAYERS:=32}" "${FIRST:=8}" "${ALL:=80}" "${FEWER:=28}"
  : "${SEQUENCES:=64}" "${SEQ_LEN:=1024}" "${BATCH_SIZE:=8}" "${LIMIT:=76GB}" # LIMIT: of evaluate_70b, as on a card of 80 GB
  : "${TOKENS:=3M}" "${BUILD_SEQ_LEN:=1024}" "${BUILD_BATCH:=8}"              # of the library
  : "${EVALUATED:=6144}" "${EVALUATED_LEN:=256}"                              # sequences, tokens of each, of evaluate_ranks
  SPACE=() RANKED=(--sequences "$EVALUATED" --seq-len "$EVALUATED_LEN")
else
  : "${EIGHT:=reference}" "${SEVENTY:=reference}" "${LAYERS:=3}" "${FIRST:=2}" "${ALL:=16}" "${FEWER:=4}"
  : "${SEQUENCES:=4}" "${SEQ_LEN:=64}" "${BATCH_SIZE:=2}" "${LIMIT:=600MB}"
  : "${TOKENS:=2k}" "${BUILD_SEQ_LEN:=64}" "${BUILD_BATCH:=4}"
  SPACE=(--attention kv1,none --ffn 0.5,none) RANKED=(--small)
fi
: "${GB_70B:=142}" # of all layers

mkdir -p "$WORK" "$RESULTS"
WORK=$(realpath "$WORK")
RESULTS=$(realpath "$RESULTS")
REST=${PYTHONPATH:-}
export PYTHONPATH="$PWD${REST:+:$REST}" NCCL_NVLS_ENABLE=0 TOKENIZERS_PARALLELISM=true

source benchmarks/gpu/within.sh

# roomy GB: whether /dev/shm takes so many, and leaves 60 GB of memory
roomy() {
  local free available
  free=$(df --output=avail -B1 /dev/shm | tail -1)
  available=$("$PYTHON" -c 'from puzzle.base.machine import available_memory; print(int(available_memory()))')
  ((free / 10**9 > $1 && available / 10**9 > $1 + 60))
}
on_disk() { (($(df --output=avail -B1 "$WORK" | tail -1) / 10**9 > $1 + 10)); }
SHM=/dev/shm/puzzle-large
large() { # large GB NAME: where so many go, or NAME lies already
  if [[ -n $LARGE ]]; then
    echo "$LARGE"
  elif [[ -d $SHM/$2 ]] || { [[ ! -d $WORK/large/$2 ]] && roomy "$1"; }; then
    echo "$SHM"
  else
    echo "$WORK/large"
  fi
}

# told NAME RUN: what NAME.log says of seconds and memory becomes rows
told() { "$PYTHON" benchmarks/lib/large_rows.py "$RESULTS/$1.log" "$2" "$RESULTS/large_parents.csv"; }

BENCH=benchmarks/speed/bench_score.py
SIZES=(--sequences "$SEQUENCES" --seq-len "$SEQ_LEN" --batch-size "$BATCH_SIZE" --device "$DEVICE")

scores_8b() {
  local place few whole
  place=$(large 24 "$EIGHT-$FIRST")
  few=$place/$EIGHT-$FIRST whole=$place/$EIGHT-$LAYERS
  within 8b_make "$PYTHON" "$BENCH" "$EIGHT" "$few" --layers "$FIRST" "${SIZES[@]}" "${SPACE[@]}" --make
  if [[ -n $REPO_BASE && ! -d $RESULTS/8b_base_scores ]]; then
    PYTHONPATH="$REPO_BASE${REST:+:$REST}" within 8b_base "$PYTHON" "$REPO_BASE/$BENCH" "$EIGHT" "$few" --layers "$FIRST" "${SIZES[@]}" \
      "${SPACE[@]}" --again && cp -r "$few/lib/scores" "$RESULTS/8b_base_scores"
    told 8b_base base
  fi
  if [[ ! -d $RESULTS/8b_first_scores ]]; then
    within 8b_first "$PYTHON" "$BENCH" "$EIGHT" "$few" --layers "$FIRST" "${SIZES[@]}" "${SPACE[@]}" --again \
      && cp -r "$few/lib/scores" "$RESULTS/8b_first_scores"
    told 8b_first first
  fi
  [[ -d $RESULTS/8b_base_scores && -d $RESULTS/8b_first_scores ]] && differ "$RESULTS/8b_base_scores" "$RESULTS/8b_first_scores"
  if [[ ! -f $RESULTS/8b_whole.done ]]; then
    within 8b_whole "$PYTHON" "$BENCH" "$EIGHT" "$whole" --layers "$LAYERS" "${SIZES[@]}" "${SPACE[@]}" && touch "$RESULTS/8b_whole.done"
    told 8b_whole whole # cut off and gone on: a line for each part, with how many were missing before it
  fi
}

differ() { # differ OLD NEW: how far scores are apart
  "$PYTHON" - "$1" "$2" <<'PY' | tee -a "$RESULTS/8b_difference.txt"
import json, sys
from pathlib import Path
old, new = ({(p.name, n): s["kl"] for p in Path(d).glob("L*.json") for n, s in json.loads(p.read_text())["scores"].items()} for d in sys.argv[1:])
apart = sorted((abs(new[k] - old[k]) / max(abs(old[k]), 1e-12), k) for k in old if k in new)
print(f"{len(apart)} of {len(old)} scores: relative difference at most {apart[-1][0]:.2e} ({apart[-1][1]}), median {apart[len(apart) // 2][0]:.2e}")
PY
}

built() {
  [[ -f $LIBRARY/library.json && -d $LIBRARY/scores ]] && return
  within library "$PYTHON" benchmarks/lib/timed_puzzle.py build-library "$PARENT" --data "$DATA" --tokens "$TOKENS" --seq-len "$BUILD_SEQ_LEN" \
    --batch-size "$BUILD_BATCH" --score-sequences "$SEQUENCES" "${SPACE[@]}" --device "$DEVICE" --out "$LIBRARY"
  local code=$?
  grep -h '^TIMED' "$RESULTS/library.log"
  return $code
}

screen() {
  [[ -f $RESULTS/screen.csv ]] && return
  built || return
  within screen "$PYTHON" benchmarks/quality/bench_screen.py "$LIBRARY" --parent "$PARENT" --data "$DATA" --sequences "$SEQUENCES" \
    --device "$DEVICE" --csv "$RESULTS/screen.csv" && tail -n 1 "$RESULTS/screen.log"
}

evaluate_70b() {
  [[ -f $RESULTS/70b.done ]] && return
  local layers=$ALL place
  place=$(large "$GB_70B" "$SEVENTY-$layers")
  if [[ -z $LARGE && ! -d $place/$SEVENTY-$layers && $place == "$WORK/large" ]] && ! on_disk "$GB_70B"; then
    layers=$FEWER
    place=$(large $((GB_70B * FEWER / ALL + 5)) "$SEVENTY-$layers")
  fi
  df -h /dev/shm "$WORK" | tail -2 >>"$RESULTS/70b.log"
  within 70b "$PYTHON" "$BENCH" "$SEVENTY" "$place/$SEVENTY-$layers" --layers "$layers" "${SIZES[@]}" --memory-limit "$LIMIT" --no-score \
    && touch "$RESULTS/70b.done"
  told 70b "$layers layers"
  [[ -n $KEEP || ! -f $RESULTS/70b.done ]] || rm -rf "${place:?}/$SEVENTY-$layers"
}

evaluate_ranks() {
  built || return
  within evaluate_ranks "$PYTHON" benchmarks/speed/bench_evaluate_ranks.py "$WORK/evaluate_ranks" --parent "$PARENT" --library "$LIBRARY" \
    --data "$DATA" --ranks 1,2 "${RANKED[@]}" --csv "$RESULTS/evaluate_ranks.csv"
  grep -h -E ' on [12]:|^killed|^figures|^caches' "$RESULTS/evaluate_ranks.log"
}

for stage in "$@"; do
  case $stage in
    scores_8b | screen | evaluate_70b | evaluate_ranks) ;;
    *) echo "unknown stage $stage" >&2 && exit 2 ;;
  esac
done
for stage in "$@"; do
  begin=$SECONDS
  "$stage"
  echo "== $stage: $((SECONDS - begin)) s" | tee -a "$RESULTS/stages.log"
done
