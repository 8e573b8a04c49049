#!/usr/bin/env bash
# Mixtures of experts and hybrids on one GPU, from an empty directory: the CSVs of docs/results.md about them, cost tables, reference parents.
#
#   benchmarks/gpu/mixtures.sh WORK STAGE...       stages, with seconds as estimated; each pair below may run on two GPUs at once:
#     grouped | routing            products of experts: ours, torch's, a loop; and      grouped.csv, routing.csv           20, 60
#                                  what stands between them and the router
#     parent_moe | parent_hybrid   trains a reference parent for TRAIN_SECONDS          parent-*.tar.xz.?? (joined: tar xJ)  TRAIN_SECONDS + 80
#     road_moe | road_hybrid       needs its parent, of examples/ where none is         bld_*.csv, mixtures_*.csv          300
#                                  trained here: library, costs, global points,
#                                  children of every rule under one goal
#     heal_moe | heal_hybrid       needs its road: the children healed                  mixtures_*.csv                     200
#     table_dense | table_moe | table_qwen   costs of Nemotron-Nano-9B-v2, Nemotron 3 Nano 30B-A3B, Qwen3-30B-A3B; then
#                                  8 random children, promised and measured             costs/, predict_*.csv              300, 300, 200
#     vllm                         tiny children in vLLM, by its own formats and the plug-in: log-probabilities, bytes of
#                                  keys, values and states                              serving_matrix_mixtures.csv        450
#
# What a stage has written stays: typed again, it goes on. Results and logs go to RESULTS as they come, and nothing runs beyond END seconds
# after T0 (date +%s). A stage that fails does not stop later ones; the exit code says whether one did. Memory: 2 to 12 GB, but for
# `table_moe` and `table_qwen`, which want 75 GB. Packages of this checkout are importable by PYTHONPATH alone, which the script sets; what else is
# on PYTHONPATH stays (ortools, click, rich, yaml; for `vllm` a vLLM of version 0.26 or newer, in VLLM_PATH where only that stage may see it).
# Every capital below may be set from outside:
#
#   CUDA_VISIBLE_DEVICES=0 benchmarks/gpu/mixtures.sh /tmp/work grouped parent_moe road_moe heal_moe
#   CUDA_VISIBLE_DEVICES=1 benchmarks/gpu/mixtures.sh /tmp/work parent_hybrid road_hybrid heal_hybrid
#   CUDA_VISIBLE_DEVICES=2 benchmarks/gpu/mixtures.sh /tmp/work table_moe table_dense table_qwen
#   CUDA_VISIBLE_DEVICES=3 benchmarks/gpu/mixtures.sh /tmp/work vllm
#
# Rehearsal on a CPU, of all but `grouped`, `routing` and the tables; `vllm` makes its children and stops:
#
#   DEVICE=cpu benchmarks/gpu/mixtures.sh /tmp/work parent_moe road_moe heal_moe vllm
#
# Committed figures are to be copied from RESULTS to benchmarks/results, tables from RESULTS/costs to puzzle/profile/costs:
#
#   benchmarks/gpu/mixtures.sh WORK grouped                    # benchmarks/results/grouped.csv
#   benchmarks/gpu/mixtures.sh WORK routing                    # benchmarks/results/routing.csv
#   benchmarks/gpu/mixtures.sh WORK table_dense                # benchmarks/results/predict_nemotron-nano-9b-v2.csv
#   benchmarks/gpu/mixtures.sh WORK table_moe                  # benchmarks/results/predict_nemotron-3-nano-30b-a3b.csv
#   benchmarks/gpu/mixtures.sh WORK table_qwen                 # benchmarks/results/predict_qwen3-30b-a3b.csv
#   benchmarks/gpu/mixtures.sh WORK vllm                       # benchmarks/results/serving_matrix_mixtures.csv
set -uo pipefail
cd "$(dirname "$0")/../.."

WORK=${1:?usage: mixtures.sh WORK STAGE...}
shift
: "${PYTHON:=python3}"
: "${RESULTS:=$WORK/results}"
: "${DEVICE:=cuda}"
: "${T0:=$(date +%s)}"
: "${END:=36000}"
# A CPU rehearses with what takes a few minutes.
small() { [[ $DEVICE != cuda ]]; }
: "${TRAIN_SECONDS:=$(small && echo 20 || echo 220)}"
: "${TRAIN_BATCH:=$(small && echo 4 || echo 128)}"
: "${MAX_FILES:=$(small && echo 300 || echo)}" # of the corpus; all when empty
: "${CORPUS:=}"                               # a .jsonl; the parents' own text when empty
: "${SEQ_LEN:=$(small && echo 128 || echo 1024)}"
: "${LIBRARY_TOKENS:=$(small && echo 4e3 || echo 2e6)}"
: "${LIBRARY_LR:=2e-3}"
: "${LIBRARY_BATCH:=$(small && echo 4 || echo 16)}"
: "${SEQUENCES:=$(small && echo 4 || echo 64)}" # held out, for scores and KL
: "${CALIBRATION:=$(small && echo 4 || echo 64)}"
: "${PROFILE_ARGS:=$(small && echo --batches 1,4 --prefill 16 --contexts 16,32 --seconds 0.002 --rounds 1 || echo --batches 16,64,256 --prefill 128 --contexts 128,256)}"
: "${INPUT_LEN:=$(small && echo 16 || echo 128)}"
: "${OUTPUT_LEN:=$(small && echo 16 || echo 128)}"
: "${LIKE:=experts=8}" # its speed and size are one goal
: "${MOE_GOALS:=throughput=1.2x throughput=1.4x}" # and these, apart by spaces: a little below 8 and 7 of the mixture's 10 layers
: "${HYBRID_GOALS:=throughput=1.25x}"
: "${RULES:=mip,experts,minitron,width,uniform}"
: "${HEAL_TOKENS:=$(small && echo 1024 || echo 10e6)}"
: "${HEAL_BATCH:=$(small && echo 2 || echo 32)}"
: "${JOBS:=$(small && echo 1 || echo 4)}" # healings at a time
# Variants of both, of the mixture alone, and of the hybrid.
: "${FFN:=experts=12,experts=8,experts=4,frequent=8,merged=8,width=0.5,width=0.25,topk=2,topk=1,experts=8-width=0.5,dense=1.0,none}"
: "${MOE_ATTENTION:=kv2,window-128,gdn,mamba2-8x64-g2-s64,none}"
: "${HYBRID_ATTENTION:=heads6,heads4,dim32,window-128,gdn,mamba2-8x64-g2-s64,none}"
: "${MOE_POINTS:=h224-d6 h200-d7 h224-d7 d7 d8}"          # hidden channels, layers, heads of Mamba-2
: "${HYBRID_POINTS:=h176 d12 h216-d15 h184-m6}"
: "${CHILDREN:=8}"  # random ones of a table
: "${TABLE_ARGS:=}" # of `puzzle profile`; its usual grid when empty
: "${VLLM_PATH:=}"
: "${VLLM_CHILDREN:=nemotron-h, experts|mamba in a llama|qwen3-moe, alike|nemotron-h, dense|qwen3_moe}"

mkdir -p "$WORK" "$RESULTS"
WORK=$(realpath "$WORK")
RESULTS=$(realpath "$RESULTS")
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=true
FAILED=0

source benchmarks/gpu/within.sh
: "${GPU:=$([[ $DEVICE == cuda ]] && gpu_name || echo cpu)}"

puzzle() { # puzzle NAME VERB...
  local name=$1
  shift
  within "$name" "$PYTHON" -m puzzle.cli "$@"
}

grouped() { [[ $DEVICE == cuda ]] && within grouped "$PYTHON" benchmarks/kernels/bench_grouped.py --out "$RESULTS/grouped.csv"; }
routing() { [[ $DEVICE == cuda ]] && within routing "$PYTHON" benchmarks/kernels/bench_routing.py --out "$RESULTS/routing.csv"; }

# ---- reference parents

pack() { # pack NAME: a parent in pieces of 15 MB; bf16 packs best where bytes know which half of a number they are
  [[ -f $WORK/$1/model.safetensors ]] || return 1
  tar -C "$WORK" -c "$1" | xz -T0 --block-size=4MiB --lzma2=preset=6,lc=0,lp=1,pb=1 >"$WORK/$1.tar.xz" || return 1
  xz -dc "$WORK/$1.tar.xz" | tar -t >/dev/null && split -b 15m -d "$WORK/$1.tar.xz" "$RESULTS/$1.tar.xz."
}

parent() { # parent NAME FAMILY
  local files=() code=0
  [[ -n $MAX_FILES ]] && files=(--max-files "$MAX_FILES")
  small && files+=(--layers 7 --length 128)
  if [[ ! -f $WORK/$1/README.md ]]; then
    within "$1" "$PYTHON" examples/train_parent.py --family "$2" --out "$WORK/$1" --seconds "$TRAIN_SECONDS" --tokens 1e10 \
      --batch "$TRAIN_BATCH" "${files[@]}" || code=$? # the weights lie there before all that is told of them
  fi
  pack "$1" || code=1
  mkdir -p "$RESULTS/$1" && cp "$WORK/$1"/{README.md,training.csv} "$RESULTS/$1/"
  return $code
}
parent_moe() { parent parent-moe qwen3_moe; }
parent_hybrid() { parent parent-hybrid nemotron_h_moe; }

# ---- the road

corpus() {
  [[ -n $CORPUS ]] && return
  CORPUS=$WORK/corpus.jsonl
  [[ -s $CORPUS ]] && return
  # shellcheck disable=SC2086
  within corpus "$PYTHON" benchmarks/lib/reference_corpus.py "$WORK/corpus.$$.jsonl" $MAX_FILES && mv "$WORK/corpus.$$.jsonl" "$CORPUS"
}

profiled() { # profiled NAME LIBRARY
  compgen -G "$2/costs/*/*.csv" | grep -qv partial && return
  # shellcheck disable=SC2086
  puzzle "$1" profile "$2" --gpu "$GPU" $PROFILE_ARGS
}

point() { # point NAME PLACE: slices the parent, and makes a library without variants of it
  local axes=() part
  [[ -f $WORK/lib-$1/points/$2/library.json ]] && return
  for part in ${2//-/ }; do
    case $part in
      h*) axes+=(--hidden "${part#h}") ;;
      d*) axes+=(--depth "${part#d}") ;;
      m*) axes+=(--mamba-heads "${part#m}") ;;
    esac
  done
  puzzle "road-$1-$2" slice "$WORK/parent-$1" "${axes[@]}" --data "$CORPUS" --out "$WORK/lib-$1/points/$2/parent" --seq-len "$SEQ_LEN" \
    --calibration-sequences "$CALIBRATION" --score-sequences "$SEQUENCES" --force &&
    puzzle "road-$1-$2" build-library "$WORK/lib-$1/points/$2/parent" --data "$CORPUS" --attention parent --ffn parent --tokens 0 \
      --seq-len "$SEQ_LEN" --calibration-sequences "$CALIBRATION" --no-score --out "$WORK/lib-$1/points/$2"
}

begun() { # begun NAME ATTENTION FFN: the library of 0 tokens, whose costs are those of the trained one
  [[ -f $WORK/init-$1/library.json ]] && return
  puzzle "road-$1-init" build-library "$WORK/parent-$1" --data "$CORPUS" --attention "$2" --ffn "$3" --tokens 0 --seq-len "$SEQ_LEN" \
    --batch-size "$LIBRARY_BATCH" --lr "$LIBRARY_LR" --no-score --out "$WORK/init-$1"
}

children() { # children NAME LOG OPTION...
  local name=$1 log=$2 words=() one goals=${1^^}_GOALS
  shift 2
  for one in ${!goals}; do words+=(--goal "$one"); done
  for one in $LIKE; do words+=(--like "$one"); done
  within "$log" "$PYTHON" benchmarks/quality/bench_mixtures.py --library "$WORK/lib-$name" --data "$CORPUS" --gpu "$GPU" "${words[@]}" \
    --rules "$RULES" --sequences "$SEQUENCES" --seq-len "$SEQ_LEN" --input-len "$INPUT_LEN" --output-len "$OUTPUT_LEN" \
    --children "$WORK/children-$name" --out "$RESULTS/mixtures_$name.csv" "$@"
}

road() { # road NAME ATTENTION FFN POINTS
  [[ -e $WORK/parent-$1 || ! -d examples/parent_$1 ]] || cp -r "examples/parent_$1" "$WORK/parent-$1"
  [[ -f $WORK/parent-$1/model.safetensors ]] || { echo "-- road_$1: no parent in $WORK/parent-$1" && return 1; }
  corpus && begun "$1" "$2" "$3" && profiled "road-$1-profile" "$WORK/init-$1" || return 1
  local place slicing=()
  for place in $4; do
    point "$1" "$place" &
    slicing+=($!)
  done
  if [[ ! -s $RESULTS/bld_$1.csv ]]; then
    within "road-$1-bld" "$PYTHON" benchmarks/quality/bench_bld.py --parent "$WORK/parent-$1" --data "$CORPUS" --library "$WORK/lib-$1" \
      --initial "$WORK/init-$1" --attention "$2" --ffn "$3" --tokens "$LIBRARY_TOKENS" --seq-len "$SEQ_LEN" --batch-size "$LIBRARY_BATCH" \
      --lr "$LIBRARY_LR" --score-sequences "$SEQUENCES" --out "$RESULTS/bld_$1.csv"
  fi
  wait "${slicing[@]}"
  [[ -s $RESULTS/bld_$1.csv ]] || return 1
  cp -rn "$WORK/init-$1/costs" "$WORK/lib-$1/"
  for place in $4; do
    [[ -f $WORK/lib-$1/points/$place/library.json ]] && profiled "road-$1-$place" "$WORK/lib-$1/points/$place"
  done
  (($(left) > 5)) || return 1 # what has no costs yet stays a point of the next call
  for place in $4; do # one that failed is no point
    compgen -G "$WORK/lib-$1/points/$place/costs/*/*.csv" | grep -qv partial || rm -f "$WORK/lib-$1/points/$place/library.json"
  done
  children "$1" "road-$1-children"
}
road_moe() { road moe "$MOE_ATTENTION" "$FFN" "$MOE_POINTS"; }
road_hybrid() { road hybrid "$HYBRID_ATTENTION" "$FFN,shared=0.5" "$HYBRID_POINTS"; }

healed() { corpus && children "$1" "heal-$1" --heal-tokens "$HEAL_TOKENS" --heal-batch-size "$HEAL_BATCH" --jobs "$JOBS"; }
heal_moe() { healed moe; }
heal_hybrid() { healed hybrid; }

# ---- cost tables

predicted() { # predicted SHAPES OPTION...: its costs, then random children of it
  local shapes=$1 table
  shift
  small && echo "-- $shapes: not on a CPU" && return 1
  table=$(compgen -G "$WORK/costs/*/$shapes.csv" | head -1)
  if [[ -z $table ]]; then # of one that is cut off the points so far lie beside: in WORK/costs of another call they are not measured again
    # shellcheck disable=SC2086
    puzzle "table-$shapes" profile --shapes "$shapes" --gpu "$GPU" --out "$WORK/costs" $TABLE_ARGS
    table=$(compgen -G "$WORK/costs/*/$shapes.csv" | head -1)
    rm -f "$RESULTS"/costs/*/"$shapes.partial.csv"
    mkdir -p "$RESULTS/costs" && cp -r "$WORK"/costs/* "$RESULTS/costs/"
    [[ -n $table ]] || return 1
  fi
  [[ -s $RESULTS/predict_$shapes.csv && -f $WORK/predicted-$shapes ]] && return
  within "predict-$shapes" "$PYTHON" benchmarks/speed/bench_predict.py --gpu "$GPU" --shapes "$shapes" --table "$table" \
    --count "$CHILDREN" --out "$RESULTS/predict_$shapes.csv" "$@" || return 1
  touch "$WORK/predicted-$shapes"
}
table_dense() { predicted nemotron-nano-9b-v2; }
table_moe() { predicted nemotron-3-nano-30b-a3b --batches 1,16,64,256; }
table_qwen() { predicted qwen3-30b-a3b --batches 1,16,64; }

# ---- vLLM

vllm() {
  local names
  IFS='|' read -r -a names <<<"$VLLM_CHILDREN"
  if small; then
    within vllm-children "$PYTHON" benchmarks/lib/tiny_children.py "$WORK/tiny"
    return
  fi
  source benchmarks/gpu/vllm.sh
  PYTHONPATH="$PYTHONPATH:$PLUG_IN${VLLM_PATH:+:$VLLM_PATH}" within vllm "$PYTHON" benchmarks/serving/serving_matrix.py --gpu --append \
    --children "${names[@]}" --out "$RESULTS/serving_matrix_mixtures.csv"
}

for stage in "$@"; do
  case $stage in
    grouped | routing | parent_moe | parent_hybrid | road_moe | road_hybrid | heal_moe | heal_hybrid | table_dense | table_moe | table_qwen | vllm) ;;
    *) echo "unknown stage $stage" >&2 && exit 2 ;;
  esac
done
for stage in "$@"; do
  begin=$SECONDS
  "$stage" || FAILED=1
  echo "== $stage: $((SECONDS - begin)) s"
done
exit $FAILED
