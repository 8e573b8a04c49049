"""Greedy text of many sequences in one llama.cpp context, decoded together, as llama-server batches its slots.

    PYTHON serving_llama_cpp.py JOB.json RESULT.json

llama-cpp-python's own server answers one request after the other; its library decodes any number of sequences in a batch.
job:    {"model": FILE.gguf, "prompts": [[token ids], ...] of one length, "num_tokens": N, "threads": T, "rounds": R}
result: {"seconds": [per round, prefill included], "tokens": [[N ids], ...], "version": text}
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import sys
import time
from typing import Any

import llama_cpp as lib
import numpy


def run(job: dict[str, Any]) -> dict[str, Any]:
    quiet = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(quiet, ctypes.c_void_p())
    lib.llama_backend_init()
    settings = lib.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(job["model"].encode(), settings)
    prompts, count = job["prompts"], job["num_tokens"]
    options = lib.llama_context_default_params()
    options.n_seq_max = len(prompts)
    options.n_ctx = len(prompts) * (len(prompts[0]) + count)
    options.n_batch = options.n_ubatch = 512
    options.n_outputs_max = len(prompts)
    options.n_threads = options.n_threads_batch = job["threads"]
    options.type_k = options.type_v = lib.GGML_TYPE_F32
    context = lib.llama_init_from_model(model, options)
    if not model or not context:
        sys.exit(f"llama.cpp could not load {job['model']}")
    size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    batch = lib.llama_batch_init(options.n_batch, 0, 1)
    seconds: list[float] = []
    tokens: list[list[int]] = []

    def decode(entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """(token, position, sequence, wanted) each -> the most likely next token of each that is wanted."""
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, int(wanted)
        if code := lib.llama_decode(context, batch):
            sys.exit(f"llama_decode returned {code}")
        rows = [lib.llama_get_logits_ith(context, i) for i, entry in enumerate(entries) if entry[3]]
        return [int(numpy.ctypeslib.as_array(row, shape=(size,)).argmax()) for row in rows]

    for _ in range(job["rounds"]):
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        begin = time.perf_counter()
        length = len(prompts[0])
        every = [(t, p, s, p == length - 1) for s, prompt in enumerate(prompts) for p, t in enumerate(prompt)]
        first: list[int] = []
        for start in range(0, len(every), options.n_batch):
            first += decode(every[start : start + options.n_batch])
        tokens = [[token] for token in first]
        for position in range(length, length + count - 1):
            found = decode([(tokens[s][-1], position, s, True) for s in range(len(prompts))])
            for sequence, token in zip(tokens, found, strict=True):
                sequence.append(token)
        seconds.append(time.perf_counter() - begin)
    version = f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}"
    return {"seconds": seconds, "tokens": tokens, "version": version}


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as handle:
        given = json.load(handle)
    result = run(given)
    with open(sys.argv[2], "w", encoding="utf-8") as handle:
        json.dump(result, handle)
