# For the commands beside this file, which `source` it with T0, END and RESULTS set.

# gpu_name: h100 or h200, as puzzle calls what nvidia-smi finds
gpu_name() {
  case $(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1) in
    *H200*) echo h200 ;;
    *) echo h100 ;;
  esac
}

left() { echo $((T0 + END - $(date +%s))); }

# within NAME COMMAND...: logs it, and ends it with the time
within() {
  local name=$1 seconds begin=$SECONDS
  shift
  seconds=$(left)
  ((seconds > 5)) || { echo "-- $name: no time left" && return 1; }
  timeout -k 5 "$seconds" "$@" >>"$RESULTS/$name.log" 2>&1
  local code=$?
  echo "-- $name: $((SECONDS - begin)) s, exit $code"
  ((code == 0)) || { grep -E '^rank [0-9]+: ' "$RESULTS/$name.log" | tail -n 4; tail -n 6 "$RESULTS/$name.log"; } # before what torchrun adds
  return $code
}
