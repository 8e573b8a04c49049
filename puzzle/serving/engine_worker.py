"""Runs in vLLM's own environment and imports nothing of ours but the plug-in: one engine, timed offline. Started by `engine_run.py`.

    PYTHON engine_worker.py JOB.json        prints lines "puzzle: {...}": the engine, then a line per point

A point is a batch of prompts of random tokens that start together, as vLLM's `LLM.generate` runs them: once for a token each (the
prompts' time) and once to their ends. The clock is read after every step of the engine; what counts as a step's time is the median
while all sequences decode.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import os
import sys
import threading
import time
import types
from statistics import median
from typing import Any

SETTINGS = {  # engine and caller in one process, nothing from the network, no kernels that may be missing
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_USE_DEEP_GEMM": "0", "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip
WARM_UP = 2  # tokens
SHORT, TIMES = 0.5, 5  # seconds of runs together, below which they are repeated, and how often at most


def end_with_caller() -> None:
    """A caller that is killed closes our input; what it left running would slow down whoever measures next."""

    def wait() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def say(**facts: Any) -> None:
    print("\npuzzle: " + json.dumps(facts, allow_nan=False), flush=True)


def prepare(reader: str, oldest: list[int], newest: list[int]) -> str | None:
    """Why this Python cannot measure, in words of `engine_run.REFUSALS`; None when it can."""
    if importlib.util.find_spec("vllm") is None:
        return "missing"
    import vllm

    numbers = [int(part) for part in vllm.__version__.split(".")[:2] if part.isdigit()]
    if not oldest <= numbers <= newest:
        return "version"
    warm_up = types.ModuleType("stub")  # of another model; its kernels are not in every build
    warm_up.minimax_m3_msa_warmup = lambda worker: None  # type: ignore[attr-defined]
    sys.modules.setdefault("vllm.model_executor.warmup.minimax_m3_msa_warmup", warm_up)
    if reader == "nemotron-nas":
        from vllm import ModelRegistry
        from vllm.model_executor.models.nemotron_nas import DeciLMForCausalLM

        ModelRegistry.register_model("DeciLMForCausalLM", DeciLMForCausalLM)  # spares a process that looks at it
    elif reader == "hf" and not importlib.metadata.entry_points(group="vllm.general_plugins", name="puzzle"):
        if importlib.util.find_spec("puzzle") is None:
            return "plug-in"
        from vllm import ModelRegistry

        from puzzle.serving.vllm_model import PuzzleForCausalLM  # on PYTHONPATH, not installed
        from puzzle.serving.vllm_plugin import ARCHITECTURE, register

        register()
        ModelRegistry.register_model(ARCHITECTURE, PuzzleForCausalLM)  # spares a process that looks at it
    return None


def start(job: dict[str, Any]) -> Any:
    import torch
    from vllm import LLM

    more: dict[str, Any] = {"enforce_eager": True}
    if torch.cuda.is_available():
        more = {
            "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
            "gpu_memory_utilization": job["utilization"],
        }
    if job["random"]:
        more["load_format"] = "dummy"
    if job["kv_dtype"]:
        more["kv_cache_dtype"] = job["kv_dtype"]
    return LLM(
        model=job["path"],
        trust_remote_code=job["reader"] == "nemotron-nas",
        dtype=job["dtype"],
        skip_tokenizer_init=True,
        max_model_len=job["max_model_len"],
        max_num_seqs=job["max_num_seqs"],
        enable_prefix_caching=False,
        **more,
    )


def held(model: Any) -> tuple[int, int]:
    """Bytes of the weights and of the caches, what layers share counted once."""
    found = [module.kv_cache for module in model.modules() if hasattr(module, "kv_cache")]
    caches = [cache for one in found for cache in (one if isinstance(one, list | tuple) else [one])]
    stores = {c.untyped_storage().data_ptr(): c.untyped_storage().nbytes() for c in caches}
    return sum({p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}.values()), sum(stores.values())


def facts_of(llm: Any) -> dict[str, Any]:
    """What the engine says of itself. cached_tokens: that its cache holds, in sequences of max_model_len."""
    import torch
    import vllm
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity

    engine, gpu = llm.llm_engine, torch.cuda.is_available()
    cache = engine.engine_core.engine_core.scheduler.kv_cache_config
    tokens = get_kv_cache_capacity(engine.vllm_config, cache)[0] if cache.kv_cache_groups else 0
    ((weights, caches),) = llm.apply_model(held)
    free, total = torch.cuda.mem_get_info() if gpu else (0, 0)
    return {
        "versions": f"vLLM {vllm.__version__}, torch {torch.__version__}"
        + (", CUDA graphs, no torch.compile" if gpu else ", eager"),
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "weight_bytes": weights if gpu else None,  # on a CPU vLLM packs them where nobody counts
        "cache_bytes": caches,
        "cached_tokens": tokens,
        "card_bytes": total,
        "used_bytes": total - free,
        "max_num_batched_tokens": engine.vllm_config.scheduler_config.max_num_batched_tokens,
    }


def run(llm: Any, prompts: list[list[int]], num_tokens: int) -> tuple[float, list[float], int]:
    """(seconds of the whole, of each of the engine's steps, how many of these came before the first sequence ended): what
    `LLM.generate` does, with a clock."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    engine, start, first, ended = llm.llm_engine, time.perf_counter(), 0, 0
    llm.enqueue([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    times = [time.perf_counter()]
    while engine.has_unfinished_requests():
        finished = engine.step()
        times.append(time.perf_counter())
        if finished and not ended:
            first = len(times) - 2
        ended += len(finished)
    if ended != len(prompts):
        raise RuntimeError(f"{ended} of {len(prompts)} requests came back")
    return times[-1] - start, [after - before for before, after in itertools.pairwise(times)], first


def step_of(steps: list[float], first: int, num_tokens: int) -> float:
    """Median seconds of the steps in which all sequences decoded: after the last prompt's, before the first end; of these the middle
    half, so that the mean context is that of half the tokens."""
    prompts = max(1, len(steps) - num_tokens + 1)
    every = steps[prompts:first] or steps[first - 1 : first] or steps
    cut = len(every) // 4
    return median(every[cut : len(every) - cut])


def measure(llm: Any, point: dict[str, int], vocab: int, repeats: int, capacity: int) -> dict[str, Any]:
    import numpy

    batch, length, num_tokens = point["num_seqs"], point["input_len"], point["output_len"]
    if capacity and batch * (length + num_tokens) > capacity:
        return {"skipped": f"{batch * (length + num_tokens)} tokens where the cache holds {capacity}"}
    rng = numpy.random.default_rng(0)
    prompts = rng.integers(0, vocab, size=(batch, length)).tolist()
    run(llm, prompts, WARM_UP)
    first: list[float] = []
    whole: list[float] = []
    step = []
    while len(first) < repeats or (sum(first) < SHORT and len(first) < TIMES):
        first.append(run(llm, prompts, 1)[0])
    while len(whole) < repeats or (sum(whole) < SHORT and len(whole) < TIMES):
        seconds, steps, end = run(llm, prompts, num_tokens)
        whole.append(seconds)
        step.append(step_of(steps, end, num_tokens))
    return {"prefill": median(first), "whole": median(whole), "step": median(step)}


def main() -> None:
    end_with_caller()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's own figures are read below
    with open(sys.argv[1], encoding="utf-8") as handle:
        job = json.load(handle)
    if (reason := prepare(job["reader"], job["oldest"], job["newest"])) is not None:
        version = ""
        if reason == "version":
            import vllm

            version = vllm.__version__
        say(refused=reason, version=version)
        return
    begin = time.perf_counter()
    llm = start(job)
    facts = facts_of(llm)
    say(engine=facts, start_seconds=round(time.perf_counter() - begin, 1))
    for point in job["points"]:
        say(point=point, measured=measure(llm, point, job["vocab_size"], job["repeats"], facts["cached_tokens"]))
    say(done=True)


if __name__ == "__main__":
    main()
