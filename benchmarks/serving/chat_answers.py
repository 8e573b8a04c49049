"""Greedy answers of a checkpoint in vLLM, through its chat template: what a served child says beside its parent.

Runs in vLLM's own environment; a child in the default export needs puzzle's plug-in there. The tokenizer of the checkpoint writes the
prompts and reads the answers, so that vLLM sees token ids alone. Rows of JSON, one per question: model, question, answer, tokens,
whether the answer ended by itself, versions, device, date.

    PYTHON_OF_VLLM benchmarks/serving/chat_answers.py CHECKPOINT --name parent --out answers.jsonl [--tokens 160] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import types
from pathlib import Path

QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that returns the largest of three numbers.",
    "Give me three tips for sleeping better.",
    "Rewrite this politely: Send me the report now.",
    "A train leaves at 9:15 and takes 50 minutes. When does it arrive?",
)
ROOM = 256  # tokens of a prompt, at most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--name", required=True, help="Of the model, in the rows.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=160, help="Of an answer, at most.")
    parser.add_argument("--dtype", default="bfloat16", help="What vLLM computes in; float32 on a CPU.")
    given = parser.parse_args()
    for key, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_USE_DEEP_GEMM": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING",
    }.items():  # fmt: skip
        os.environ.setdefault(key, value)
    warm_up = types.ModuleType("stub")  # of another model; its kernels are not in every build
    warm_up.minimax_m3_msa_warmup = lambda worker: None  # type: ignore[attr-defined]
    sys.modules.setdefault("vllm.model_executor.warmup.minimax_m3_msa_warmup", warm_up)
    import torch
    import vllm
    from transformers import PreTrainedTokenizerFast

    # By the files of the tokenizer alone: no code of a child is asked for.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(given.checkpoint)
    if tokenizer.chat_template is None:
        sys.exit(f"error: {given.checkpoint} has no chat template")
    asked = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=True, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for question in QUESTIONS
    ]
    if (longest := max(map(len, asked))) > ROOM:
        sys.exit(f"error: a question takes {longest} tokens of {given.checkpoint}'s: at most {ROOM}")
    engine = vllm.LLM(
        model=str(given.checkpoint), dtype=given.dtype, max_model_len=ROOM + given.tokens, max_num_seqs=len(asked),
        skip_tokenizer_init=True, enable_prefix_caching=False, enforce_eager=True,
    )  # fmt: skip
    end = tokenizer.eos_token_id
    sampling = vllm.SamplingParams(temperature=0, max_tokens=given.tokens, detokenize=False, stop_token_ids=[end])
    answers = engine.generate([{"prompt_token_ids": list(ids)} for ids in asked], sampling, use_tqdm=False)
    facts = {
        "versions": f"vLLM {vllm.__version__}, torch {torch.__version__}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "date": datetime.date.today().isoformat(),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with open(given.out, "w", encoding="utf-8") as handle:
        for question, answer in zip(QUESTIONS, answers, strict=True):
            ids = list(answer.outputs[0].token_ids)
            ended = bool(ids) and ids[-1] == end
            text = tokenizer.decode(ids, skip_special_tokens=True)
            row = {"model": given.name, "question": question, "answer": text, "tokens": len(ids), "ended": ended}
            print(f"{given.name}: {question}\n  {text!r}", flush=True)
            handle.write(json.dumps(row | facts, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
