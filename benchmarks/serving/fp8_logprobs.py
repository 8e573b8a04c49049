"""A child in fp8 in vLLM beside ours: log-probabilities after prompts of 17 to 3,000 tokens, 32 at once, and greedy texts.

Protocol: `reference` runs in puzzle's environment (on a GPU where there is one, in float32) and keeps, for 32 prompts of random tokens,
the log-probabilities of the next token and 16 greedy tokens of three models: the child as it is stored (fp8 weights, exact), with
activations rounded per token as vLLM does, and, where the checkpoint has scales for the cache, with that rounded too; beside them
the same child in bf16, if given. `vllm` runs in vLLM's own environment, which needs no puzzle but its plug-in for a default export, and
compares. In float32 on a CPU vLLM's answer is that of the second model up to where a value rounds the other way, which spreads with
depth. In bf16 on a GPU hold the mean against "computed in bf16": the last of the rounded models, with all else in bf16 too, beside the
same in float32.

    python benchmarks/serving/fp8_logprobs.py reference CHILD_FP8 REF.npz [--bf16 CHILD_BF16] [--longest 3000]
    PYTHON_OF_VLLM benchmarks/serving/fp8_logprobs.py vllm CHILD_FP8 REF.npz [--dtype bfloat16] [--csv ROWS.csv]
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy

NEW = 16
IN_BF16 = "computed in bf16"


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
    alone = any(rope.switches_at is not None for rope in structure.ropes.values())  # tables go by the longest one
    groups = alike([len(p) for p in prompts], 1 if alone else 2)
    kinds = ["weights", "activations", *(["cache"] if cached else []), IN_BF16, *(["bf16"] if bf16 else [])]
    for kind in kinds:
        dtype = torch.bfloat16 if kind == IN_BF16 else torch.float32
        model = load_model(bf16 if kind == "bf16" and bf16 else child, device=on, dtype=dtype)
        if kind in ("activations", "cache", IN_BF16):
            round_activations(model.blocks, kept)
        if kind == "cache" or (kind == IN_BF16 and cached):
            round_cache(model, child)
        found = [answered(model, [prompts[index] for index in group], on) for group in groups]
        order = numpy.argsort([index for group in groups for index in group])
        last, texts = (numpy.concatenate(each)[order] for each in zip(*found, strict=True))
        saved |= {f"{kind} last": last, f"{kind} texts": texts}
        print(f"{kind}: done", flush=True)
        if kind != "weights":
            other = as_served(kinds) if kind == IN_BF16 else "weights"
            delta = numpy.abs(saved[f"{kind} last"] - saved[f"{other} last"])
            print(f"ours, {kind} against {other}: |Δ log p| max {delta.max():.4f} mean {delta.mean():.5f}")
    numpy.savez(out, kinds=kinds, **saved)


def alike(lengths: list[int], times: float) -> list[list[int]]:
    """Places of prompts that go together: none is longer than `times` the shortest, or they are equally long."""
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and lengths[place] <= times * lengths[groups[-1][0]]:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def answered(model: Any, prompts: list[Any], on: Any) -> tuple[Any, Any]:
    """Log-probabilities after the prompts [B, V], and NEW greedy tokens [B, NEW]. What stands behind a prompt reaches none of its tokens."""
    import torch

    row, ends = torch.arange(len(prompts), device=on), torch.tensor([len(p) for p in prompts], device=on)
    ids = torch.zeros(len(prompts), max(map(len, prompts)) + NEW, dtype=torch.long)
    for own, prompt in zip(ids, prompts, strict=True):
        own[: len(prompt)] = torch.tensor(prompt)
    ids, last = ids.to(on), None
    with torch.no_grad():
        for step in range(NEW):
            stream = model.hidden(ids[:, : ids.shape[1] - NEW + step])
            logits = model.logits(stream[row, ends + step - 1]).float()
            last = torch.log_softmax(logits, -1) if last is None else last
            ids[row, ends + step] = logits.argmax(-1)
    assert last is not None
    texts = [own[end : end + NEW] for own, end in zip(ids, ends.tolist(), strict=True)]
    return last.cpu().numpy(), torch.stack(texts).cpu().numpy()


def as_served(kinds: Iterable[str]) -> str:
    """Which of them rounds all that an engine does."""
    return "cache" if "cache" in kinds else "activations"


def served(child: Path, path: Path, dtype: str, table: Path | None) -> None:
    for key, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_USE_DEEP_GEMM": "0", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "WARNING",
    }.items():  # fmt: skip
        os.environ.setdefault(key, value)
    warm_up = types.ModuleType("stub")  # of another model; its kernels are not in every build
    warm_up.minimax_m3_msa_warmup = lambda worker: None  # type: ignore[attr-defined]
    sys.modules.setdefault("vllm.model_executor.warmup.minimax_m3_msa_warmup", warm_up)
    import torch
    import vllm
    from vllm import LLM, SamplingParams

    saved = numpy.load(path)
    ends = numpy.cumsum(saved["lengths"])
    prompts = [p.tolist() for p in numpy.split(saved["prompts"], ends[:-1])]
    vocab = saved["weights last"].shape[1]
    by_plug_in = json.loads((child / "config.json").read_text())["model_type"] == "puzzle"
    engine = LLM(
        model=str(child), trust_remote_code=not by_plug_in, dtype=dtype, max_model_len=int(max(saved["lengths"])) + NEW, max_num_seqs=64,
        skip_tokenizer_init=True, enable_prefix_caching=False, max_logprobs=vocab, enforce_eager=True,
    )  # fmt: skip
    asked: list[Any] = [{"prompt_token_ids": p} for p in prompts]
    common: dict[str, Any] = {"temperature": 0, "detokenize": False, "ignore_eos": True}
    # All words after the prompt alone: of every token they would take minutes.
    first = engine.generate(asked, SamplingParams(max_tokens=1, logprobs=vocab, **common), use_tqdm=False)
    answers = engine.generate(asked, SamplingParams(max_tokens=NEW, **common), use_tqdm=False)
    last = numpy.full((len(first), vocab), numpy.nan)
    for row, answer in enumerate(first):
        for token, found in answer.outputs[0].logprobs[0].items():
            last[row, token] = found.logprob
    rows: list[dict[str, Any]] = []

    def compare(who: str, kind: str, theirs: Any, texts: list[list[int]]) -> None:
        delta = numpy.abs(theirs - saved[f"{kind} last"])
        same = sum(text == ours.tolist() for text, ours in zip(texts, saved[f"{kind} texts"], strict=True))
        found = {"mean": f"{numpy.nanmean(delta):.5f}", "max": f"{numpy.nanmax(delta):.4f}"}
        rows.append(
            {"child": child.name, "of": who, "against": kind, **found, "texts_equal": same, "texts": len(texts)}
        )
        print(
            f"{who} against ours, {kind}: |Δ log p| max {found['max']} mean {found['mean']}, {same} of {len(texts)} texts equal"
        )

    kinds = [str(kind) for kind in saved["kinds"]]
    for kind in kinds:
        compare(f"vLLM {dtype}", kind, last, [list(answer.outputs[0].token_ids) for answer in answers])
    if IN_BF16 in kinds:
        compare(IN_BF16, as_served(kinds), saved[f"{IN_BF16} last"], saved[f"{IN_BF16} texts"].tolist())
    if table is not None:
        facts = {
            "prompts": len(prompts),
            "longest": int(max(saved["lengths"])),
            "versions": f"vLLM {vllm.__version__}, torch {torch.__version__}",
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "date": datetime.date.today().isoformat(),
        }
        with open(table, "a", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, [*rows[0], *facts])
            if handle.tell() == 0:
                writer.writeheader()
            writer.writerows(row | facts for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("reference", "vllm"))
    parser.add_argument("child", type=Path)
    parser.add_argument("file", type=Path, help="REF.npz")
    parser.add_argument("--bf16", type=Path, help="The same child in bf16, to compare with.")
    parser.add_argument("--longest", type=int, default=3000, help="Of the prompts.")
    parser.add_argument("--dtype", default="bfloat16", help="What vLLM computes in; float32 on a CPU.")
    parser.add_argument("--csv", type=Path, help="Rows of what is compared go to its end.")
    given = parser.parse_args()
    if given.what == "reference":
        reference(given.child, given.file, given.bf16, given.longest)
    else:
        served(given.child, given.file, given.dtype, given.csv)


if __name__ == "__main__":
    main()
