# For the commands beside this file that run vLLM, which `source` it with WORK set. PLUG_IN is for the PYTHONPATH of what vLLM serves through
# the plug-in: a checkout that is not installed has no entry point, by which vLLM finds it.
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_USE_DEEP_GEMM=0 VLLM_ENABLE_V1_MULTIPROCESSING=0
export VLLM_HOST_IP=127.0.0.1 GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo
export VLLM_CACHE_ROOT="${VLLM_CACHE_ROOT:-$WORK/cache/vllm}" TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$WORK/cache/triton}"
PLUG_IN=$WORK/plug-in
mkdir -p "$PLUG_IN/puzzle_nas-0.1.0.dist-info"
printf 'Metadata-Version: 2.1\nName: puzzle-nas\nVersion: 0.1.0\n' >"$PLUG_IN/puzzle_nas-0.1.0.dist-info/METADATA"
printf '[vllm.general_plugins]\npuzzle = puzzle.serving.vllm_plugin:register\n' >"$PLUG_IN/puzzle_nas-0.1.0.dist-info/entry_points.txt"
