#!/usr/bin/env bash
# A child after its healing, and other ways to heal, from an empty directory: SFT, GRPO, stored teachers, long text; on one GPU.
#
#   benchmarks/gpu/post_training.sh WORK STAGE...
#     child            (by those that need it, unless CHILD is given) a 2x child of PARENT, built and healed in a hurry
#     sft              chats of arithmetic.py in both modes; format and accuracy before and after           post_training.csv,
#     grpo_curriculum  GRPO of SFT's child, prompts rated and from easy to hard; assessed                   post_training_curves.csv
#     grpo_plain       the same steps on the same prompts in any order                                      (both of all three)
#     stored_logits    a teacher in memory against its top 8, 32, 128 words, at equal tokens                stored_logits.csv
#     other_tokenizer  a teacher with another tokenizer                                                     other_tokenizer.csv
#     grow             new experts learn PARENT's solutions, beside fine-tuning everything                  grow.csv
#     long_heal        stages of 4k to 32k tokens: memory and tokens/s, planned and measured                long_heal.csv
#
# The last four need no child; calls on several GPUs share WORK, and one waits for what another is making:
#
#   CUDA_VISIBLE_DEVICES=0 benchmarks/gpu/post_training.sh WORK sft grpo_curriculum &      # benchmarks/results/post_training.csv
#   CUDA_VISIBLE_DEVICES=1 benchmarks/gpu/post_training.sh WORK long_heal grpo_plain &     # benchmarks/results/post_training_curves.csv
#   CUDA_VISIBLE_DEVICES=2 benchmarks/gpu/post_training.sh WORK grow &                     # benchmarks/results/grow.csv
#   CUDA_VISIBLE_DEVICES=3 benchmarks/gpu/post_training.sh WORK stored_logits other_tokenizer & wait
#   benchmarks/gpu/post_training.sh WORK stored_logits                                     # benchmarks/results/stored_logits.csv
#   benchmarks/gpu/post_training.sh WORK other_tokenizer                                   # benchmarks/results/other_tokenizer.csv
#   benchmarks/gpu/post_training.sh WORK long_heal                                         # benchmarks/results/long_heal.csv
#
# What is in WORK is not done again, so the same call goes on where one was stopped; it needs `puzzle-nas[train]`
# installed or on PYTHONPATH. CSVs, logs, curves and answers are copied to RESULTS all the while, and nothing runs beyond END seconds after T0
# (date +%s). A stage that fails stops none that does not need it. Every capital below may be set from outside. Rehearsal on a CPU, minutes a stage:
#
#   SMALL=1 PARENT=MODEL-WITH-A-CHAT-TEMPLATE DATA=text.jsonl benchmarks/gpu/post_training.sh /tmp/work sft grpo_curriculum grpo_plain
#   SMALL=1 WRITER=examples/parent LONG_PARENT=examples/parent benchmarks/gpu/post_training.sh /tmp/work stored_logits other_tokenizer grow long_heal
set -uo pipefail
cd "$(dirname "$0")/../.."

WORK=${1:?usage: post_training.sh WORK STAGE...}
shift
if [[ -n ${SMALL:-} ]]; then
  : "${PATIENCE:=20}" "${GPU:=cpu}" "${DEVICE:=cpu}" "${TEXT_MB:=1}" "${PROFILE_ARGS:=--batches 1,4 --prefill 64 --contexts 64,128 --seconds 0.02 --rounds 1}"
  : "${LIBRARY_ARGS:=--attention none --ffn none --tokens 0 --seq-len 64 --score-sequences 2 --calibration-sequences 2}"
  : "${SOLVE_ARGS:=--throughput 1.2x --input-len 64 --output-len 32}" "${HEAL_ARGS:=--tokens 512 --seq-len 64 --batch-size 4 --validation-sequences 2}"
  : "${QUESTIONS:=200}" "${SFT_TOKENS:=1K}" "${SFT_LENGTH:=256}" "${SFT_BATCH:=1}" "${ASSESSED:=4}" "${ANSWER:=8}"
  : "${PROMPTS:=8}" "${SAMPLES:=2}" "${GRPO_STEPS:=4}" "${GROUP:=2}" "${PER_STEP:=2}" "${SAVE_EVERY:=2}"
  : "${STORED_ARGS:=--tokens 2048 --max-files 40}" "${TOKENIZER_ARGS:=--tokens 2e3 --max-files 40 --written 8 --new-tokens 32}"
  : "${GROW_ARGS:=--problems 64 --max-files 40 --max-new-tokens 48 --tokens 2048 --seq-len 64 --batch-size 4 --held-out 8 --lr 1e-3}"
  : "${LONG_ARGS:=--lengths 512,1024 --steps 2 --max-files 40}"
fi
: "${PYTHON:=python3}"
: "${PARENT:=HuggingFaceTB/SmolLM2-135M-Instruct}"
: "${DATA:=}"  # text of the child's own
: "${CHILD:=}" # an exported child that is healed; empty: it is made
: "${RESULTS:=$WORK/results}"
: "${T0:=$(date +%s)}"
: "${END:=36000}"
: "${DEVICE:=cuda}"
: "${PATIENCE:=1}" # times the seconds that a command may take
: "${TEXT_MB:=40}" # of DATA, where that is one .jsonl
# the child
: "${LIBRARY_ARGS:=--attention kv1,none --ffn 0.5,none --tokens 1M --seq-len 512 --batch-size 16 --score-sequences 32}"
: "${PROFILE_ARGS:=}"
: "${SOLVE_ARGS:=--throughput 2x --input-len 512 --output-len 256}"
: "${HEAL_ARGS:=--tokens 5M --seq-len 1024 --batch-size 16 --eval-every 0 --save-every 100}"
# SFT and GRPO
: "${QUESTIONS:=12000}"
: "${LARGEST:=999}" # number in one
: "${SFT_TOKENS:=1.5M}"
: "${SFT_LENGTH:=4096}" # of a packed row
: "${SFT_BATCH:=4}"
: "${SFT_LR:=2e-4}"
: "${SFT_SAVE:=50}" # steps
: "${ASSESSED:=512}" # held-out questions, a mode
: "${ANSWER:=96}"    # tokens at most
: "${PROMPTS:=1024}" # of GRPO
: "${SAMPLES:=8}"
: "${GRPO_STEPS:=50}"
: "${GROUP:=16}"
: "${PER_STEP:=8}"
: "${GRPO_LR:=5e-6}"
: "${HARDEST:=0}" # pass rate, of the curriculum's prompts
: "${SAVE_EVERY:=10}"
# other ways to heal
: "${STORED_ARGS:=--tokens 3000000 --batch-size 32 --max-files 3000}"
: "${TOKENIZER_ARGS:=--tokens 3e6 --batch-size 32 --written 8000 --new-tokens 384 --max-files 9000}"
: "${WRITER:=$PARENT}"
: "${GROW_ARGS:=--tokens 2000000 --max-files 3000}"
: "${LONG_PARENT:=$PARENT}"
: "${LONG_ARGS:=--steps 20 --max-files 3000}"
if [[ -z ${GPU:-} ]]; then
  case $(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1) in
    *H200*) GPU=h200 ;;
    *) GPU=h100 ;;
  esac
fi

mkdir -p "$WORK"/{csv,logs,assessed,curves} "$RESULTS" || exit 2
WORK=$(realpath "$WORK")
RESULTS=$(realpath "$RESULTS")
# One GPU: a trainer that sees several would split every batch over them.
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-16}"
# Code of a checkpoint is copied before it is imported: of every call to a folder of its own.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_MODULES_CACHE="$WORK/modules/$$" TOKENIZERS_PARALLELISM=true
[[ ! -d $PARENT ]] || export HF_HUB_OFFLINE=1
SCRIPTS=examples/post_training
LIBRARY=$WORK/library
CSV=$WORK/csv
MADE=${CHILD:-$WORK/healed}

left() { echo $((T0 + END - $(date +%s))); }

# within NAME SECONDS COMMAND...: logs it, and ends it after that long, or with the time
within() {
  local name=$1 seconds=$(($2 * PATIENCE)) begin=$SECONDS code
  shift 2
  ((seconds < $(left))) || seconds=$(left)
  ((seconds > 5)) || { echo "-- $name: no time left" && return 1; }
  timeout -k 5 "$seconds" "$@" >>"$WORK/logs/$name.log" 2>&1 & # so that a signal for this script ends it too
  running=$!
  wait $running
  code=$?
  echo "-- $name: $((SECONDS - begin)) s, exit $code"
  echo "$name,$((SECONDS - begin)),$code,$GPU" >>"$CSV/seconds.csv"
  ((code == 0)) || tail -n 4 "$WORK/logs/$name.log"
  return $code
}

# once NAME: the function of that name, unless another call is at it, which is waited for
once() {
  local code=1 file
  exec {file}>"$WORK/.$1.lock"
  flock -w "$(($(left) > 0 ? $(left) : 0))" "$file" && { "$1"; code=$?; }
  exec {file}>&-
  return $code
}

verb() {
  local name=$1 seconds=$2
  shift 2
  within "$name" "$seconds" "$PYTHON" -m puzzle.cli "$@"
}

# shellcheck disable=SC2086
child() {
  [[ -f $MADE/config.json ]] && return
  [[ -z $CHILD ]] || { echo "no child in $CHILD" && return 1; }
  [[ -n $DATA ]] || { echo "DATA: text for a child of $PARENT" && return 1; }
  local text=$DATA every
  if [[ -f $DATA ]]; then # every so manieth document
    text=$WORK/text.jsonl
    every=$(($(stat -Lc %s "$DATA") / (TEXT_MB * 1000000) + 1))
    [[ -s $text ]] || { awk "NR % $every == 0" "$DATA" >"$text.part" && mv "$text.part" "$text"; }
  fi
  if [[ ! -f $WORK/solution/architecture.json ]]; then
    verb child_build 150 build-library "$PARENT" --data "$text" --device "$DEVICE" --out "$LIBRARY" $LIBRARY_ARGS || return
    verb child_profile 150 profile "$LIBRARY" --gpu "$GPU" $PROFILE_ARGS || return
    verb child_solve 100 solve "$LIBRARY" --gpu "$GPU" --out "$WORK/solution" $SOLVE_ARGS || return
  fi
  [[ -f $WORK/child/config.json ]] || verb child_export 100 export "$LIBRARY" "$WORK/solution" --out "$WORK/child" || return
  verb child_heal 200 heal "$WORK/child" --teacher "$PARENT" --data "$text" --device "$DEVICE" --out "$MADE" $HEAL_ARGS
}

rows() { within rows 60 "$PYTHON" benchmarks/lib/post_training_rows.py "$WORK" "$CSV"; }

assess() { # assess STEP CHILD
  [[ ! -f $WORK/assessed/$1.json ]] || return 0
  within "assess_$1" 60 "$PYTHON" benchmarks/lib/post_training_rows.py machine "$WORK/assessed/$1.machine.json" || return
  within "assess_$1" 150 "$PYTHON" $SCRIPTS/assess.py "$2" "$WORK/arithmetic/held-out.jsonl" --limit "$ASSESSED" --at-once "$ASSESSED" \
    --max-new-tokens "$ANSWER" --out "$WORK/assessed/$1.json"
}

tuned() { # SFT's child, and what it took
  once child || return
  local chats=$WORK/arithmetic
  if [[ ! -f $chats/run.yaml ]]; then
    within chats 60 "$PYTHON" $SCRIPTS/arithmetic.py --out "$chats" --count "$QUESTIONS" --largest "$LARGEST" || return
    head -n "$PROMPTS" "$chats/prompts.jsonl" >"$chats/few.jsonl"
    echo "stages: [{name: both, blend: both.yaml, tokens: $SFT_TOKENS, max_length: $SFT_LENGTH, batch_size: $SFT_BATCH, lr: $SFT_LR}]" \
      >"$chats/run.yaml"
  fi
  assess healed "$MADE"
  [[ -f $WORK/sft/both/config.json ]] || within sft 240 "$PYTHON" $SCRIPTS/sft.py "$chats/run.yaml" --child "$MADE" --out "$WORK/sft" --save-every "$SFT_SAVE" || return
  cp "$WORK/sft/both/trainer_state.json" "$WORK/curves/sft.json"
  assess sft "$WORK/sft/both" || true # who waits for the child needs no assessment
}

sft() {
  once tuned && once rows && [[ -f $WORK/assessed/healed.json && -f $WORK/assessed/sft.json ]]
}

grpo() { # grpo NAME PROMPTS OPTION...
  [[ -f $WORK/$1/config.json ]] || within "$1" 360 "$PYTHON" $SCRIPTS/grpo.py "$WORK/sft/both" "$2" --out "$WORK/$1" --steps "$GRPO_STEPS" \
    --group "$GROUP" --prompts-per-step "$PER_STEP" --max-new-tokens "$ANSWER" --lr "$GRPO_LR" --save-every "$SAVE_EVERY" "${@:3}" || return
  cp "$WORK/$1/trainer_state.json" "$WORK/curves/$1.json"
  assess "$1" "$WORK/$1" && once rows
}

grpo_curriculum() {
  once tuned || return
  local rated=$WORK/arithmetic/rated.jsonl
  [[ -f $rated.done ]] || { within rate 200 "$PYTHON" $SCRIPTS/curriculum.py "$WORK/sft/both" "$WORK/arithmetic/few.jsonl" --out "$rated" \
    --samples "$SAMPLES" --at-once 128 --max-new-tokens "$ANSWER" && touch "$rated.done"; } || return
  grpo grpo_curriculum "$rated" --hardest "$HARDEST"
}

grpo_plain() {
  once tuned && grpo grpo_plain "$WORK/arithmetic/few.jsonl"
}

# whole NAME SECONDS COMMAND...: as within, but for what has ended well before
whole() {
  [[ ! -f $WORK/.$1.done ]] || return 0
  within "$@" && touch "$WORK/.$1.done"
}

# shellcheck disable=SC2086
stored_logits() {
  whole stored_logits 300 "$PYTHON" benchmarks/quality/bench_stored_logits.py --device "$DEVICE" --append --out "$CSV/stored_logits.csv" $STORED_ARGS
}

# shellcheck disable=SC2086
other_tokenizer() {
  whole other_tokenizer 300 "$PYTHON" benchmarks/quality/bench_other_tokenizer.py --device "$DEVICE" --append --work "$WORK/tokenizer" \
    --out "$CSV/other_tokenizer.csv" $TOKENIZER_ARGS
}

# shellcheck disable=SC2086
grow() {
  whole grow 400 "$PYTHON" benchmarks/quality/bench_grow.py --writer "$WRITER" --device "$DEVICE" --append --solutions "$WORK/solutions.jsonl" \
    --out "$CSV/grow.csv" $GROW_ARGS
}

# shellcheck disable=SC2086
long_heal() {
  whole long_heal 300 "$PYTHON" benchmarks/speed/bench_long_heal.py --parent "$LONG_PARENT" --device "$DEVICE" --append \
    --out "$CSV/long_heal.csv" $LONG_ARGS
}

for stage in "$@"; do
  case $stage in
    child | sft | grpo_curriculum | grpo_plain | stored_logits | other_tokenizer | grow | long_heal) ;;
    *) echo "unknown stage $stage" >&2 && exit 2 ;;
  esac
done

keep() { cp -r "$CSV"/. "$WORK/logs" "$WORK/assessed" "$WORK/curves" "$RESULTS"; }

while sleep 5; do keep; done 2>/dev/null &
trap 'kill '$!' 2>/dev/null; keep' EXIT
trap 'kill $running 2>/dev/null; exit 143' TERM INT
failed=0 running=
for stage in "$@"; do
  begin=$SECONDS
  echo "== $stage"
  case $stage in
    child) once child ;;
    *) "$stage" ;;
  esac || { failed=1 && echo "== $stage failed"; }
  echo "== $stage: $((SECONDS - begin)) s"
done
exit $failed
