#!/usr/bin/env bash
# Tensor parallelism, fusion and ranks on N GPUs of one host, from an empty directory: the CSVs of docs/results.md about several GPUs.
#
#   benchmarks/gpu/four_gpus.sh WORK STAGE...        stages; `children` needs `sums` and `shares`, `ranks` needs `ranks_apart`:
#     sums         all-reduces of 2 and N GPUs                                        costs/all_reduce/GPU.csv
#     apart        on a GPU each: shares | ranks_apart
#     shares       (one GPU) what a share of the parent costs; children for three latencies
#     ranks_apart  (three GPUs) build and heal SmolLM2 on one and on two              ranks.csv
#     children     parent and children that N GPUs share: promised, measured          tp_children.csv
#     ranks        build and heal on N                                                ranks.csv
#     fusion       layers fused in twos, in fours, all in one                         fusion_latency.csv
#     published    the 253B child beside its parent                                   published_child.csv
#
# What a stage has written stays, results go to RESULTS as they come, and nothing runs beyond END seconds after T0 (date +%s). Every
# capital below may be set from outside:
#
#   PARENT=SmolLM2-135M DATA=text.jsonl benchmarks/gpu/four_gpus.sh /tmp/work sums apart children ranks fusion published
#
# Rehearsal on a CPU, four processes:   DEVICE=cpu PARENT=examples/parent DATA=/usr/lib/python3.11/email benchmarks/gpu/four_gpus.sh ...
set -uo pipefail
cd "$(dirname "$0")/../.."

WORK=${1:?usage: four_gpus.sh WORK STAGE...}
shift
: "${PYTHON:=python3}"
: "${PARENT:=HuggingFaceTB/SmolLM2-135M-Instruct}"
: "${DATA:=}"
: "${RESULTS:=$WORK/results}"
: "${DEVICE:=cuda}"
: "${N:=4}"
: "${SHAPES:=llama-3.3-70b}" # of `children`
: "${PRECISIONS:=fp8,bf16}"  # of `published`
: "${MEMORY:=40}"            # GB of different weights in it
: "${TOKENS:=2M}"            # of `ranks`
: "${HEAL_TOKENS:=10M}"
: "${T0:=$(date +%s)}"
: "${END:=36000}"

mkdir -p "$WORK" "$RESULTS"
WORK=$(realpath "$WORK")
RESULTS=$(realpath "$RESULTS")
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" NCCL_NVLS_ENABLE=0 TOKENIZERS_PARALLELISM=true
SMALL=()
[[ $DEVICE == cuda ]] || SMALL=(--small)

source benchmarks/gpu/within.sh
: "${GPU:=$(gpu_name)}"

ranked() { # ranked PORT COUNT COMMAND...
  local port=$1 count=$2
  shift 2
  within "$NAME" "$PYTHON" -m torch.distributed.run --nproc-per-node "$count" --master-port "$port" "$@"
}
on() { # on GPUS COMMAND...: only these are seen
  local gpus=$1
  shift
  CUDA_VISIBLE_DEVICES=$gpus "$@" # which a CPU does not ask
}

sums() {
  [[ $DEVICE == cuda ]] || return 0
  for count in 2 "$N"; do
    NAME=sums-$count ranked 29501 "$count" -m puzzle.cli profile --gpu "$GPU" --tp "$count" --all-reduce --out "$WORK/costs"
  done
  cp -r "$WORK/costs/all_reduce" "$RESULTS/"
}

shares() {
  local costs=()
  [[ -d $WORK/costs/all_reduce ]] && costs=(--costs "$WORK/costs")
  on 0 within shares "$PYTHON" benchmarks/speed/bench_tp_children.py "$WORK/children" --tp "$N" --gpu "$GPU" --shapes "$SHAPES" \
    "${costs[@]}" "${SMALL[@]}"
}

RANKS=("$PYTHON" benchmarks/speed/bench_ranks.py "$WORK/ranks" --parent "$PARENT" --data "$DATA" --gpu "$GPU" --tokens "$TOKENS" --heal-tokens "$HEAL_TOKENS")

ranks_apart() {
  on 1 within ranks-1 "${RANKS[@]}" --ranks 1 --csv "$WORK/ranks-1.csv" "${SMALL[@]}" &
  on 2,3 within ranks-2 "${RANKS[@]}" --ranks 2 --stages build --csv "$WORK/ranks-2.csv" "${SMALL[@]}"
  until [[ -f $WORK/ranks/child/config.json ]] || ! kill -0 $! 2>/dev/null; do sleep 1; done
  on 2,3 within ranks-2 "${RANKS[@]}" --ranks 2 --stages heal --child "$WORK/ranks/child" --append --csv "$WORK/ranks-2.csv" "${SMALL[@]}"
  wait
  cat "$WORK/ranks-1.csv" <(tail -n +2 "$WORK/ranks-2.csv") >"$RESULTS/ranks.csv"
}

apart() {
  shares &
  ranks_apart
  wait
}

ranks() {
  within ranks-n "${RANKS[@]}" --ranks "$N" --child "$WORK/ranks/child" --append --csv "$RESULTS/ranks.csv" "${SMALL[@]}"
}

children() {
  cp -r "$WORK"/children/library/costs "$RESULTS/" 2>/dev/null
  NAME=children ranked 29502 "$N" benchmarks/speed/bench_tp_children.py "$WORK/children" --tp "$N" --gpu "$GPU" --shapes "$SHAPES" --append \
    --csv "$RESULTS/tp_children.csv" "${SMALL[@]}"
}

fusion() {
  local small=()
  [[ $DEVICE == cuda ]] || small=(--device cpu --shapes reference --batches 1 --steps 5)
  NAME=fusion ranked 29503 "$N" benchmarks/speed/bench_fusion_latency.py --tp "$N" --append --csv "$RESULTS/fusion_latency.csv" "${small[@]}"
}

published() {
  local shares=8,$N
  ((N == 8)) && shares=8
  [[ $DEVICE == cuda ]] || shares=$N
  NAME=published ranked 29504 "$N" benchmarks/speed/bench_published_child.py --tp "$N" --shares "$shares" --precisions "$PRECISIONS" \
    --memory "$MEMORY" --append --csv "$RESULTS/published_child.csv" "${SMALL[@]}"
}

for stage in "$@"; do
  case $stage in
    sums | apart | shares | ranks_apart | children | ranks | fusion | published) ;;
    *) echo "unknown stage $stage" >&2 && exit 2 ;;
  esac
done
for stage in "$@"; do
  begin=$SECONDS
  "$stage"
  echo "== $stage: $((SECONDS - begin)) s"
done
