#!/usr/bin/env bash
# Fusion and healing on one GPU, from an empty directory: the CSVs and pictures of both in docs/results.md.
#
#   benchmarks/quality/h100_fusion_heal.sh WORK STAGE...      stages, each needing those before it:
#     library   text, tokens, a block library of the reference parent, its scores
#     profile   what every sub-block of it costs on this GPU
#     fuse      children of the same speed: fused, not fused, layers removed; KL and loss of each       fusion.csv
#     rate      which learning rate heals best, and how fast a step is                                  heal_lr.csv
#     heal      the children of `fuse`, healed with the same tokens                                     fusion_heal.csv
#     ablation  the 2x child, healed with four losses                                                   heal.csv, heal.png
#     aware     solved for fusion against fused afterwards, as fast by measurement                      fusion_aware_measured.csv
#     resume    killed and continued against left alone                                                 heal_resume.csv
#
# Everything stays in WORK; what is there is not done again, so a stage that was cut off goes on when it is called again.
# CSVs and pictures are copied to RESULTS all the while. Every capital below may be set from outside, for instance for a rehearsal:
#
#   LIBRARY_ARGS="--attention kv2,kv1,linear,none" ...      # the shipped costs hold these: leave `profile` out
#   GPU=cpu DEVICE=cpu MAX_FILES=300 ... benchmarks/quality/h100_fusion_heal.sh /tmp/work library profile
#
# The committed figures, stage by stage:
#
#   benchmarks/quality/h100_fusion_heal.sh WORK library fuse             # benchmarks/results/fusion_h100.csv
#   benchmarks/quality/h100_fusion_heal.sh WORK rate                     # benchmarks/results/heal_lr.csv
#   benchmarks/quality/h100_fusion_heal.sh WORK ablation                 # benchmarks/results/heal.csv
#   HEAL_TOKENS=15e6 benchmarks/quality/h100_fusion_heal.sh WORK heal    # benchmarks/results/fusion_heal.csv
#   benchmarks/quality/h100_fusion_heal.sh WORK aware                    # benchmarks/results/fusion_aware_measured.csv
#   benchmarks/quality/h100_fusion_heal.sh WORK resume                   # benchmarks/results/heal_resume.csv
set -euo pipefail
cd "$(dirname "$0")/../.."

WORK=${1:?usage: h100_fusion_heal.sh WORK STAGE...}
shift
: "${PYTHON:=python3}"
: "${PARENT:=examples/parent}"
: "${RESULTS:=$WORK/results}"
: "${GPU:=h100}"
: "${DEVICE:=auto}"
: "${MAX_FILES:=}" # of the corpus; all when empty
: "${SEQ_LEN:=1024}"
: "${VALIDATION:=128}" # held-out sequences in healing
# library
: "${LIBRARY_TOKENS:=24M}"
: "${LIBRARY_BATCH:=16}"
: "${LIBRARY_LR:=2e-3}"
: "${LIBRARY_ARGS:=}" # e.g. --attention kv1,none --ffn 0.5,none
: "${SCORE_SEQUENCES:=64}"
: "${PROFILE_ARGS:=}"
# children
: "${SPEEDUP:=2x}"
: "${INPUT_LEN:=128}"
: "${OUTPUT_LEN:=128}"
: "${SEQUENCES:=64}" # held-out sequences for KL and loss of children that are not healed
# healing
: "${BATCH:=32}"
: "${RATES:=5e-4,1e-3,2e-3,4e-3}"
: "${RATE_TOKENS:=4e6}"
: "${HEAL_TOKENS:=25e6}"
: "${ABLATION_TOKENS:=50e6}"
: "${EVALUATIONS:=20}"
: "${RESUME_TOKENS:=3M}"
: "${SAVE_EVERY:=20}"
# solved for fusion against fused afterwards
: "${BATCHES:=16,512}"
: "${GOALS:=1.5x,2x,3x}"

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=true
mkdir -p "$WORK" "$RESULTS"
RESULTS=$(realpath "$RESULTS")
CORPUS=$WORK/corpus.jsonl
LIBRARY=$WORK/library
LENGTHS=(--input-len "$INPUT_LEN" --output-len "$OUTPUT_LEN")
HEAL=("$PYTHON" benchmarks/quality/bench_heal.py --parent "$PARENT" --corpus "$CORPUS" --cache "$WORK/tokens.pt" --device "$DEVICE"
  --seq-len "$SEQ_LEN" --batch-size "$BATCH" --validation-sequences "$VALIDATION" --evaluations "$EVALUATIONS")

puzzle() { "$PYTHON" -m puzzle.cli "$@"; }

library() {
  # shellcheck disable=SC2086
  [[ -s $CORPUS ]] || "$PYTHON" benchmarks/lib/reference_corpus.py "$CORPUS" $MAX_FILES
  # shellcheck disable=SC2086
  puzzle build-library "$PARENT" --data "$CORPUS" --tokens "$LIBRARY_TOKENS" --seq-len "$SEQ_LEN" \
    --batch-size "$LIBRARY_BATCH" --lr "$LIBRARY_LR" --score-sequences "$SCORE_SEQUENCES" --device "$DEVICE" \
    $LIBRARY_ARGS --out "$LIBRARY"
}

profile() {
  compgen -G "$LIBRARY/costs/$GPU/*.csv" | grep -qv partial && return
  # shellcheck disable=SC2086
  puzzle profile "$LIBRARY" --gpu "$GPU" $PROFILE_ARGS
}

fuse() {
  if [[ ! -f $WORK/child-2x/config.json ]]; then
    puzzle solve "$LIBRARY" --throughput "$SPEEDUP" --gpu "$GPU" "${LENGTHS[@]}" --out "$WORK/solution"
    puzzle export "$LIBRARY" "$WORK/solution" --out "$WORK/child-2x"
  fi
  [[ -f $WORK/dependency.json ]] || puzzle fuse "$PARENT" --data "$CORPUS" --device "$DEVICE" --dependency-only \
    --out "$WORK/dependency.json"
  [[ -f $WORK/csv/fusion.csv ]] || "$PYTHON" benchmarks/quality/bench_fusion.py --library "$LIBRARY" --data "$CORPUS" --gpu "$GPU" \
    --throughput "$SPEEDUP" "${LENGTHS[@]}" --sequences "$SEQUENCES" --out "$WORK/fusion" --csv "$WORK/csv/fusion.csv"
}

rate() {
  "${HEAL[@]}" --child "$WORK/child-2x" --ablations KL+cosine --lr "$RATES" --tokens "$RATE_TOKENS" \
    --out "$WORK/csv/heal_lr.csv" --plot "$WORK/csv/heal_lr.png"
}

heal() {
  "${HEAL[@]}" --child "$WORK/fusion/unfused" --child "$WORK/fusion/own" --child "$WORK/fusion/last" \
    --child "$WORK/fusion/removed" --child "$WORK/fusion/with-last" --ablations KL+cosine \
    --lr-from "$WORK/csv/heal_lr.csv" --tokens "$HEAL_TOKENS" \
    --out "$WORK/csv/fusion_heal.csv" --plot "$WORK/csv/fusion_heal.png"
}

ablation() {
  "${HEAL[@]}" --child "$WORK/child-2x" --lr-from "$WORK/csv/heal_lr.csv" --tokens "$ABLATION_TOKENS" \
    --out "$WORK/csv/heal.csv" --plot "$WORK/csv/heal.png"
}

aware() {
  "$PYTHON" benchmarks/quality/bench_fusion_aware.py --library "$LIBRARY" --dependency "$WORK/dependency.json" --data "$CORPUS" \
    --gpu "$GPU" "${LENGTHS[@]}" --batches "$BATCHES" --goals "$GOALS" --sequences "$SEQUENCES" --device "$DEVICE" --measure \
    --csv "$WORK/csv/fusion_aware_measured.csv"
}

resume() {
  [[ -f $WORK/csv/heal_resume.csv ]] && return
  "$PYTHON" benchmarks/quality/bench_heal_resume.py --child "$WORK/child-2x" --parent "$PARENT" --data "$CORPUS" \
    --tokens "$RESUME_TOKENS" --seq-len "$SEQ_LEN" --batch-size "$BATCH" --save-every "$SAVE_EVERY" --device "$DEVICE" \
    --work "$WORK/resume" --out "$WORK/csv/heal_resume.csv"
}

for stage in "$@"; do
  case $stage in
    library | profile | fuse | rate | heal | ablation | aware | resume) ;;
    *) echo "unknown stage $stage" >&2 && exit 2 ;;
  esac
done

keep() { find "$WORK/csv" -maxdepth 1 -type f -exec cp {} "$RESULTS" \;; }

mkdir -p "$WORK/csv"
while sleep 5; do keep; done &
trap 'kill '$!' || true; keep' EXIT
for stage in "$@"; do
  echo "== $stage"
  begin=$SECONDS
  "$stage"
  echo "== $stage: $((SECONDS - begin)) s"
done
