# For the commands beside this file, which `source` it with T0, END and RESULTS set.

# gpu_name: h100 or h200, as puzzle calls what nvidia-smi finds
gpu_name() {
  case $(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1) in
    *H200*) echo h200 ;;
    *) echo h100 ;;
  esac
}

left() { echo $((T0 + END - $(date +%s))); }

# within NAME COMMAND...: logs it, in a log of each LANE, and ends it with the time
within() {
  local name=$1 log=$RESULTS/$1${LANE:+-$LANE}.log seconds before begin=$SECONDS
  shift
  seconds=$(left)
  ((seconds > 5)) || { echo "-- $name: no time left" && return 1; }
  before=$(cat "$log" 2>/dev/null | wc -c)
  timeout -k 5 "$seconds" "$@" >>"$log" 2>&1
  local code=$?
  echo "-- $name: $((SECONDS - begin)) s, exit $code"
  ((code == 0)) || { grep -E '^rank [0-9]+: ' "$log" | tail -n 4; tail -n 6 "$log"; } # before what torchrun adds
  tail -c "+$((before + 1))" "$log" | grep -m 1 '^out of time' # told of this call
  return $code
}
