"""A child in fp8 in vLLM beside ours: log-probabilities after prompts of 17 to 3,000 tokens, 32 at once, and greedy texts.

Protocol: `reference` runs in puzzle's environment (on a GPU where there is one, in float32) and keeps, for 32 prompts of random tokens,
the log-probabilities of the next token and 16 greedy tokens of three models: the child as it is stored (fp8 weights, exact), with
activations rounded per token as vLLM does, and, where the checkpoint has scales for the cache, with that rounded too; beside them
the same child in bf16, if given. `vllm` runs in vLLM's own environment, which needs no puzzle, and compares. In float32 on a CPU
vLLM's answer is that of the second model up to where a value rounds the other way, which spreads with depth; in bf16 on a GPU look
at the mean beside that of two precisions of ours.

    python benchmarks/serving/fp8_logprobs.py reference CHILD_FP8 REF.npz [--bf16 CHILD_BF16] [--longest 3000]
    PYTHON_OF_VLLM benchmarks/serving/fp8_logprobs.py vllm CHILD_FP8 REF.npz [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy

NEW = 16


def hf_module(name: str) -> str:
    """'0.ffn.up_proj' -> 'model.layers.0.mlp.up_proj'"""
    from puzzle.parents.names import MODULES

    layer, slot, matrix = name.split(".", 2)
    return f"model.layers.{layer}.{MODULES[slot]}.{matrix}"


def reference(child: Path, out: Path, bf16: Path | None, longest: int) -> None:
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
    from fp8_served import round_cache
    from puzzle.base.device import pick_device
    from puzzle.blocklib.plain.fp8 import round_activations
    from puzzle.parents.opened import open_model
    from puzzle.runtime.model import load_model

    on, structure = pick_device("auto"), open_model(child).structure
    longest = min(longest, structure.max_length - NEW)
    rng = numpy.random.default_rng(0)
    lengths = [
        17,
        40,
        *(min(n, longest) for n in (333, 1500, 2047, 3000)),
        *rng.integers(17, min(900, longest), size=26),
    ]
    prompts = [rng.integers(5, structure.vocab_size - 5, size=int(n)) for n in lengths]
    saved: dict[str, Any] = {"lengths": [len(p) for p in prompts], "prompts": numpy.concatenate(prompts)}
    stored = open_model(child).checkpoint.names
    cached = any(name.endswith(".k_scale") for name in stored)
    kept = [  # of a child in several precisions: matrices in bf16, whose activations nobody rounds
        name
        for name, one in load_model(child).blocks.named_modules()
        if isinstance(one, torch.nn.Linear) and f"{hf_module(name)}.weight_scale" not in stored
    ]
    kinds = ["weights", "activations", *(["cache"] if cached else []), *(["bf16"] if bf16 else [])]
    for kind in kinds:
        model = load_model(bf16 if kind == "bf16" and bf16 else child, device=on, dtype=torch.float32)
        if kind in ("activations", "cache"):
            round_activations(model.blocks, kept)
        if kind == "cache":
            round_cache(model, child)
        last, texts = [], []
        with torch.no_grad():
            for prompt in prompts:
                ids = torch.tensor(prompt)[None].to(on)
                for step in range(NEW):
                    logits = model.logits(model.hidden(ids)[0, -1])
                    if step == 0:
                        last.append(torch.log_softmax(logits, -1).cpu().numpy())
                    ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
                texts.append(ids[0, -NEW:].cpu().numpy())
        saved |= {f"{kind} last": numpy.stack(last), f"{kind} texts": numpy.stack(texts)}
        print(f"{kind}: done", flush=True)
        if kind != "weights":
            delta = numpy.abs(saved[f"{kind} last"] - saved["weights last"])
            print(f"ours, {kind} against weights: |Δ log p| max {delta.max():.4f} mean {delta.mean():.5f}")
    numpy.savez(out, kinds=kinds, **saved)


def served(child: Path, path: Path, dtype: str) -> None:
    for key, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_USE_DEEP_GEMM": "0", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "WARNING",
    }.items():  # fmt: skip
        os.environ.setdefault(key, value)
    warm_up = types.ModuleType("stub")  # of another model; its kernels are not in every build
    warm_up.minimax_m3_msa_warmup = lambda worker: None  # type: ignore[attr-defined]
    sys.modules.setdefault("vllm.model_executor.warmup.minimax_m3_msa_warmup", warm_up)
    from vllm import LLM, SamplingParams

    saved = numpy.load(path)
    ends = numpy.cumsum(saved["lengths"])
    prompts = [p.tolist() for p in numpy.split(saved["prompts"], ends[:-1])]
    vocab = saved["weights last"].shape[1]
    engine = LLM(
        model=str(child), trust_remote_code=True, dtype=dtype, max_model_len=int(max(saved["lengths"])) + NEW, max_num_seqs=64,
        skip_tokenizer_init=True, enable_prefix_caching=False, max_logprobs=vocab, enforce_eager=True,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=NEW, logprobs=vocab, detokenize=False, ignore_eos=True)
    answers = engine.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    last = numpy.full((len(answers), vocab), numpy.nan)
    for row, answer in enumerate(answers):
        for token, found in answer.outputs[0].logprobs[0].items():
            last[row, token] = found.logprob
    for kind in saved["kinds"]:
        delta = numpy.abs(last - saved[f"{kind} last"])
        theirs, ours = (answer.outputs[0].token_ids for answer in answers), saved[f"{kind} texts"]
        same = sum(list(t) == o.tolist() for t, o in zip(theirs, ours, strict=True))
        print(
            f"vLLM {dtype} against ours, {kind}: |Δ log p| max {numpy.nanmax(delta):.4f} mean {numpy.nanmean(delta):.5f}, "
            f"{same} of {len(answers)} texts equal"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("reference", "vllm"))
    parser.add_argument("child", type=Path)
    parser.add_argument("file", type=Path, help="REF.npz")
    parser.add_argument("--bf16", type=Path, help="The same child in bf16, to compare with.")
    parser.add_argument("--longest", type=int, default=3000, help="Of the prompts.")
    parser.add_argument("--dtype", default="bfloat16", help="What vLLM computes in; float32 on a CPU.")
    given = parser.parse_args()
    if given.what == "reference":
        reference(given.child, given.file, given.bf16, given.longest)
    else:
        served(given.child, given.file, given.dtype)


if __name__ == "__main__":
    main()
