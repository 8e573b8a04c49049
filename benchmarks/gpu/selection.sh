#!/usr/bin/env bash
# Choosing children of a real model, what they are worth before and after healing, and what else was tried, from an empty directory on 1 to 3 GPUs.
#
#   benchmarks/gpu/selection.sh WORK STAGE...        stages; all but `library` and `initial` need `library`:
#     library      library, scores and costs of the parent
#     initial      narrow FFNs by contribution and by second order, maps of low rank by the inputs' second
#                  moments and by plain SVD, before and after distillation                                 initial.csv
#     selection    ranks of children near the optimum, and every way to choose                             selection.csv
#     chosen       every way to choose and the baselines: chosen, measured, healed on HEAL_TOKENS; where TASKS is set,
#                  the tasks of TASK_METHODS before and after                                              chosen.csv
#     long         the same of LONG_METHODS, healed on LONG_TOKENS; their tasks after it where TASKS is set chosen_long.csv
#     coupled      a second pass of distillation for the MIP's child at the last of SPEEDS                 coupled.csv
#
# Several GPUs share WORK: GPUS=0,1,2 starts a lane on each (0,0,0: three on one, where one loads and reads while others heal), or call the
# same line once a GPU with CUDA_VISIBLE_DEVICES and a LANE of its own. A lane takes what no other one is at. What is written stays and is not
# done again, results go to RESULTS as they come, and nothing runs beyond END seconds after T0 (date +%s). Every capital below may be set
# from outside:
#
#   PARENT=SmolLM2-135M-Instruct DATA=english.jsonl TASKS=sets GPUS=0,1,2 benchmarks/gpu/selection.sh /tmp/work library initial selection chosen
#
# TASKS is a directory with HumanEval.jsonl.gz, gsm8k/test.jsonl, hellaswag/cases.jsonl and truthfulqa_mc1/cases.jsonl. The committed figures:
#
#   INITIAL_LRS=3e-3 benchmarks/gpu/selection.sh WORK initial     # benchmarks/results/initial.csv
#   benchmarks/gpu/selection.sh WORK library selection            # benchmarks/results/selection.csv
#   TASKS=sets SPEEDS=1.5 GPUS=0,0,0 benchmarks/gpu/selection.sh WORK library chosen    # benchmarks/results/chosen.csv, 1.5x
#   TASKS=sets SPEEDS=2 GPUS=0,0,0 benchmarks/gpu/selection.sh WORK library chosen      # benchmarks/results/chosen.csv, 2x
#   SPEEDS=2 benchmarks/gpu/selection.sh WORK coupled                                   # benchmarks/results/coupled.csv, of the same WORK
#   TASKS=sets SPEEDS=2 GPUS=0,0,0 benchmarks/gpu/selection.sh WORK library long        # benchmarks/results/chosen_long.csv
#
# Rehearsal on a CPU, of the reference parent:
#
#   SMALL=1 DATA=/usr/lib/python3.11 TASKS=sets benchmarks/gpu/selection.sh /tmp/work library initial selection chosen long coupled
set -uo pipefail
cd "$(dirname "$0")/../.."

WORK=${1:?usage: selection.sh WORK STAGE...}
shift
if [[ -n ${SMALL:-} ]]; then
  : "${GPU:=cpu}" "${RECIPE:=examples/quickstart.yaml}" "${PARENT:=examples/parent}" "${SPEEDS:=1.3}" "${RANK_SPEEDS:=1.25,1.5}"
  : "${CHILDREN:=6}" "${FINALISTS:=4}" "${RANK_ROUNDS:=1}" "${ROUNDS:=1}" "${CHOOSE_ON:=4}" "${COMPARE_ON:=8}" "${BETWEEN:=8192}"
  : "${HEAL_TOKENS:=16384}" "${LONG_TOKENS:=32768}" "${INITIAL_TOKENS:=8192}" "${INITIAL_FFN:=0.25,0.25-obs,linear-64,linear-64-svd}" "${TASK_LIMIT:=2}"
  : "${INITIAL_ATTENTION:=linear-64,linear-64-svd}" "${COUPLED_TOKENS:=8192}" "${SEQ_LEN:=256}" "${INITIAL_SCORES:=4}" "${INITIAL_LRS:=3e-3,1e-3}"
fi
: "${PYTHON:=python3}"
: "${RECIPE:=examples/smollm2_h100.yaml}"
: "${PARENT:=HuggingFaceTB/SmolLM2-135M-Instruct}"
: "${DATA:=}"
: "${TASKS:=}"
: "${RESULTS:=$WORK/results}"
: "${GPUS:=}"
: "${LANE:=0}"
: "${T0:=$(date +%s)}"
: "${END:=36000}"
: "${SEQ_LEN:=1024}" # of `initial`; the recipe has that of all else
# selection
: "${RANK_SPEEDS:=1.25,1.5,2}"
: "${CHILDREN:=52}" # near the optimum, at each speed
: "${FINALISTS:=16}"
: "${RANK_ROUNDS:=1}"
: "${CHOOSE_ON:=64}" # sequences that children are measured on, there and in `chosen`
# chosen
: "${SPEEDS:=1.5,2}"
: "${METHODS:=all,rescored,pairs,finalists,mip,depth,uniform,greedy,random}" # uniform-width, FFNs alone, reaches neither of SPEEDS
: "${PARTS:=choose steps bench measure heal${TASKS:+ tasks-before tasks}}"
: "${ROUNDS:=2}"
: "${COMPARE_ON:=256}"
: "${BETWEEN:=3e6}"
: "${HEAL_TOKENS:=10e6}"
: "${TASK_METHODS:=mip,all,depth,uniform,greedy,random}"
: "${TASK_LIMIT:=500}"
: "${LONG_METHODS:=mip,all,depth,uniform,greedy,random}"
: "${LONG_TOKENS:=50e6}"
# initial
: "${INITIAL_ATTENTION:=linear,linear-144,linear-144-svd}" # a quarter of SmolLM2's hidden size: half of a matrix
: "${INITIAL_FFN:=0.5,0.5-obs,0.25,0.25-obs,0.1,0.1-obs,linear,linear-144,linear-144-svd}"
: "${INITIAL_TOKENS:=8e6}"
: "${INITIAL_LRS:=3e-3,1e-3,3e-4}"
: "${INITIAL_SCORES:=32}"
# coupled
: "${COUPLED_TOKENS:=2M}"
: "${COUPLED_METHODS:=stream:0.5,ordinary:0}"

for stage in "$@"; do
  case $stage in
    library | initial | selection | chosen | long | coupled) ;;
    *) echo "unknown stage $stage" >&2 && exit 2 ;;
  esac
done
if [[ -n $GPUS ]]; then
  export T0 END
  lane=0
  for gpu in ${GPUS//,/ }; do
    GPUS="" LANE=$lane CUDA_VISIBLE_DEVICES=$gpu "benchmarks/gpu/${0##*/}" "$WORK" "$@" | sed -u "s/^/$lane: /" &
    lane=$((lane + 1))
  done
  wait
  exit
fi

mkdir -p "$WORK/claims" "$RESULTS"
WORK=$(realpath "$WORK")
RESULTS=$(realpath "$RESULTS")
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=true
CHOSEN=$WORK/chosen
LIBRARY=$CHOSEN/base/0/step-1/library
STATUS=0
source benchmarks/gpu/within.sh
: "${GPU:=$(gpu_name)}"

# joined NAME CSV...: of all lanes, as RESULTS/NAME.csv
joined() {
  local name=$1
  shift
  awk 'FNR > 1 || NR == 1' "$@" >"$WORK/$name-$LANE.csv" 2>/dev/null && mv "$WORK/$name-$LANE.csv" "$RESULTS/$name.csv"
}

# alone NAME FUNCTION...: unless another lane is at it
alone() {
  local name=$1 lock code=0
  shift
  exec {lock}>"$WORK/claims/$name"
  if "$PYTHON" -c 'import fcntl, sys; fcntl.flock(int(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)' "$lock" 2>/dev/null; then
    "$@"
    code=$?
  else
    echo "-- $name: another lane is at it"
  fi
  exec {lock}>&-
  return $code
}

minutes() { awk "BEGIN {print ($(left) - 8) / 60}"; }

# children NAME CSV METHODS PART...: of bench_chosen.py
children() {
  local name=$1 csv=$2 methods=$3
  shift 3
  sed "s/^  gpu: .*/  gpu: $GPU/" "$RECIPE" >"$WORK/recipe-$LANE.yaml"
  within "$name" "$PYTHON" benchmarks/quality/bench_chosen.py "$WORK/recipe-$LANE.yaml" "$@" --parent "$PARENT" --data "$DATA" \
    --speeds "$SPEEDS" --methods "$methods" --finalists "$FINALISTS" --rounds "$ROUNDS" --chosen-on "$CHOOSE_ON" --sequences "$COMPARE_ON" \
    --between "$BETWEEN" --minutes "$(minutes)" --work "$CHOSEN" --out "$csv" \
    ${TASKS:+--task-data "$TASKS" --task-limit "$TASK_LIMIT" --task-methods "$TASK_METHODS"}
}

there() { [[ -f $CHOSEN/library.json ]] || { echo "-- $1: no library" && return 1; }; }

library() { children library "$WORK/library-$LANE.csv" mip library; }

# shellcheck disable=SC2086
chosen() { there chosen && children chosen "$RESULTS/chosen.csv" "$METHODS" $PARTS --tokens "$HEAL_TOKENS"; }

long() {
  there long && TASK_METHODS=$LONG_METHODS children long "$RESULTS/chosen_long.csv" "$LONG_METHODS" choose measure bench heal ${TASKS:+tasks} --tokens "$LONG_TOKENS"
}

rank() { # rank SPEED: in a copy of the library, with measurements of its own
  local place=$WORK/selection/$1
  if [[ ! -d $place/library ]]; then
    rm -rf "$place/partial"
    mkdir -p "$place"
    cp -al "$LIBRARY" "$place/partial"
    rm -rf "$place/partial/children" "$place/partial/.lock"
    mv "$place/partial" "$place/library"
  fi
  within selection "$PYTHON" benchmarks/quality/bench_selection.py "$place/library" --gpu "$GPU" --data "$DATA" --parent "$PARENT" \
    --speeds "$1" "${LENGTHS[@]}" --sequences "$CHOOSE_ON" --children "$CHILDREN" --finalists "$FINALISTS" --rounds "$RANK_ROUNDS" \
    --minutes "$(minutes)" --out "$place/selection.csv"
}

selection() {
  there selection || return 1
  local code=0 speed
  LENGTHS=(--input-len "$(sed -n 's/^  input_len: //p' "$RECIPE")" --output-len "$(sed -n 's/^  output_len: //p' "$RECIPE")")
  for speed in ${RANK_SPEEDS//,/ }; do
    alone "selection-$speed" rank "$speed" || code=1
    joined selection "$WORK"/selection/*/selection.csv
  done
  return $code
}

starts() { # starts LEARNING_RATE
  within initial "$PYTHON" benchmarks/quality/bench_bld.py --parent "$PARENT" --data "$DATA" --attention "$INITIAL_ATTENTION" --ffn "$INITIAL_FFN" \
    --tokens "$INITIAL_TOKENS" --seq-len "$SEQ_LEN" --batch-size 8 --lr "$1" --score-sequences "$INITIAL_SCORES" \
    --initial "$WORK/initial/untrained-$1" --library "$WORK/initial/trained-$1" --out "$WORK/initial/$1.csv"
}

initial() {
  local code=0 lr
  mkdir -p "$WORK/initial"
  for lr in ${INITIAL_LRS//,/ }; do
    [[ -f $WORK/initial/$lr.csv ]] || alone "initial-$lr" starts "$lr" || code=1
    joined initial "$WORK"/initial/*.csv
  done
  return $code
}

again() {
  local child=$CHOSEN/chosen/mip-${SPEEDS##*,}
  [[ -d $child ]] || { echo "-- coupled: $child is not there" && return 1; }
  within coupled "$PYTHON" benchmarks/quality/bench_coupled.py "$LIBRARY" "$child" --data "$DATA" --parent "$PARENT" --methods "$COUPLED_METHODS" \
    --tokens "$COUPLED_TOKENS" --sequences "$COMPARE_ON" --minutes "$(minutes)" --work "$WORK/coupled" --out "$RESULTS/coupled.csv"
}

coupled() { there coupled && alone coupled again; }

for stage in "$@"; do
  begin=$SECONDS
  "$stage" || STATUS=1
  echo "== $stage: $((SECONDS - begin)) s"
done
exit $STATUS
