#!/usr/bin/env bash
# Tensor parallelism, fusion and ranks on N GPUs of one host, from an empty directory: the CSVs of docs/results.md about several GPUs.
#
#   benchmarks/gpu/four_gpus.sh WORK STAGE...        stages; `children` needs `sums` and `shares`, `ranks` needs `ranks_apart`:
#     sums         all-reduces of SUMS GPUs, beside those that ship                   all_reduce/GPU.csv
#     apart        on a GPU each: shares | ranks_apart
#     shares       (one GPU) what a share of the parent costs; children for latencies costs/GPU/
#     ranks_apart  (three GPUs) build and heal SmolLM2 on one and on two              ranks.csv
#     children     parent and children that N GPUs share: promised, measured          tp_children.csv
#     ranks        build and heal on N                                                ranks.csv
#     fusion       layers fused in twos, in fours, all in one                         fusion_latency.csv
#     published    the 253B child beside its parent                                   published_child.csv
#
# What a stage has written stays and is not measured again, results go to RESULTS row by row, and nothing runs beyond END seconds after T0
# (date +%s). A GPU on which a cost table is measured (`shares`, and `ranks_apart` before it heals) is full. Every capital below may be set from
# outside:
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
: "${SUMS:=2 $N}"
: "${FRACTIONS:=1}"          # of `fusion`: widths of FFNs without attention
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
  local count table=all_reduce/$GPU.csv
  mkdir -p "$WORK/costs/all_reduce"
  [[ -f $WORK/costs/$table ]] || cp "puzzle/profile/costs/$table" "$WORK/costs/$table"
  for count in $SUMS; do
    [[ -f $WORK/sums-$count.done ]] && continue
    NAME=sums-$count ranked 29501 "$count" -m puzzle.cli profile --gpu "$GPU" --tp "$count" --all-reduce --out "$WORK/costs" \
      && touch "$WORK/sums-$count.done"
    cp -r "$WORK/costs/all_reduce" "$RESULTS/"
  done
}

shares() {
  local costs=()
  [[ -d $WORK/costs/all_reduce ]] && costs=(--costs "$WORK/costs")
  on 0 within shares "$PYTHON" benchmarks/speed/bench_tp_children.py "$WORK/children" --tp "$N" --gpu "$GPU" --shapes "$SHAPES" \
    "${costs[@]}" "${SMALL[@]}"
  local code=$?
  cp -r "$WORK"/children/library/costs "$RESULTS/" 2>/dev/null
  return $code
}

RANKS=("$PYTHON" benchmarks/speed/bench_ranks.py "$WORK/ranks" --parent "$PARENT" --data "$DATA" --gpu "$GPU" --tokens "$TOKENS" \
  --heal-tokens "$HEAL_TOKENS" --go-on --csv "$RESULTS/ranks.csv" "${SMALL[@]}")
CHILD=$WORK/ranks/child

ranks_apart() {
  on 1 within ranks-1 "${RANKS[@]}" --ranks 1 &
  local first=$!
  on 2,3 within ranks-2 "${RANKS[@]}" --ranks 2 --stages build
  until [[ -f $CHILD/config.json ]] || ! kill -0 $first 2>/dev/null; do sleep 1; done
  [[ -f $CHILD/config.json ]] && on 2,3 within ranks-2 "${RANKS[@]}" --ranks 2 --stages heal --child "$CHILD"
  wait $first
}

apart() {
  shares &
  local other=$!
  ranks_apart
  wait $other
}

ranks() {
  within ranks-n "${RANKS[@]}" --ranks "$N" --child "$CHILD"
}

children() {
  NAME=children ranked 29502 "$N" benchmarks/speed/bench_tp_children.py "$WORK/children" --tp "$N" --gpu "$GPU" --shapes "$SHAPES" --go-on \
    --csv "$RESULTS/tp_children.csv" "${SMALL[@]}"
}

fusion() {
  local small=()
  [[ $DEVICE == cuda ]] || small=(--device cpu --shapes reference --batches 1 --steps 5)
  NAME=fusion ranked 29503 "$N" benchmarks/speed/bench_fusion_latency.py --tp "$N" --fractions "$FRACTIONS" --go-on \
    --csv "$RESULTS/fusion_latency.csv" "${small[@]}"
}

published() {
  local shares=8,$N
  ((N == 8)) && shares=8
  [[ $DEVICE == cuda ]] || shares=$N
  NAME=published ranked 29504 "$N" benchmarks/speed/bench_published_child.py --tp "$N" --shares "$shares" --precisions "$PRECISIONS" \
    --memory "$MEMORY" --go-on --csv "$RESULTS/published_child.csv" "${SMALL[@]}"
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
