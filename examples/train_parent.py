"""Train a reference parent on permissively licensed Python source: a Llama of 12.9 M parameters, or one with experts of about 15 M.

    python examples/train_parent.py --out examples/parent --tokens 600e6      # one GPU, a few minutes
    python examples/train_parent.py --family qwen3_moe --out examples/parent-moe --seconds 180
    python examples/train_parent.py --family nemotron_h_moe --out examples/parent-hybrid --seconds 180

Corpus: the standard library of the running Python and every installed distribution whose licence is
permissive by its own metadata. Exact duplicates are dropped. A file is held out when the sha256 of its
text says so (`puzzle.data.documents`), so the split does not depend on paths or order.
Result: a Hugging Face checkpoint (bf16 safetensors, byte-level BPE tokenizer, model card) and
`training.csv`. Those with experts train as `mixtures.py` has them, are evaluated as `puzzle` reads them and held against transformers. Quality is bits per byte on the held-out files, with `xz -9` on the same bytes beside it.

Shapes: B sequences a step, T tokens a sequence, V vocabulary.
"""

from __future__ import annotations

import csv
import importlib.metadata
import lzma
import math
import os
import re
import sysconfig
import time
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from puzzle.base.device import compute_dtype
from puzzle.data.documents import is_held_out, text_key

VOCAB, T = 4096, 1024
WARM_UP = 200  # steps
EOS, PAD = "<|endoftext|>", "<|pad|>"
PERMISSIVE = re.compile(r"\b(mit|bsd|apache|psf|python software foundation|isc|zlib|hpnd|0bsd|unlicense|cc0)\b", re.I)
RESTRICTIVE = re.compile(r"gpl|mpl|mozilla|eupl|cddl|proprietary|nvidia|non-?commercial", re.I)
TITLES = {
    "llama": ("The reference parent of `puzzle`", "A small Llama"),
    "qwen3_moe": ("The reference mixture of experts of `puzzle`", "A small Qwen3-MoE"),
    "nemotron_h_moe": (
        "The reference hybrid of `puzzle`",
        "A small model of Mamba-2, attention and experts, in the blocks of Nemotron-H,",
    ),
}
PROMPTS = ["import os\nimport sys\n\ndef main(", "class Stack:\n    def __init__(self):\n", "for i in range("]


def licence_of(dist: importlib.metadata.Distribution) -> str:
    """The licence by the distribution's metadata: SPDX expression, classifiers, or the first line of the field."""
    meta = dist.metadata
    classifiers = [c.split("::")[-1].strip() for c in meta.get_all("Classifier") or [] if c.startswith("License ::")]
    field = (meta.get("License") or "").strip().split("\n")[0][:60]
    return meta.get("License-Expression") or "; ".join(classifiers) or field


def corpus_files() -> tuple[list[Path], dict[str, str]]:
    """Every Python file whose licence is permissive, and {distribution: licence}."""
    paths = sysconfig.get_paths()
    stdlib = Path(paths["stdlib"])
    files = {p for p in stdlib.rglob("*.py") if not {"site-packages", "dist-packages"} & set(p.parts)}
    licences = {"python (standard library)": "PSF-2.0"}
    for dist in importlib.metadata.distributions():
        licence = licence_of(dist)
        if not PERMISSIVE.search(licence) or RESTRICTIVE.search(licence):
            continue
        found = [Path(str(dist.locate_file(f))) for f in dist.files or [] if f.suffix == ".py"]
        if found:
            licences[dist.metadata["Name"]] = licence
            files.update(found)
    return sorted(files), licences


def read_documents(files: list[Path]) -> tuple[list[str], list[str]]:
    """(train, held-out) texts: exact duplicates dropped, 2 % held out, the same ones as by every verb of puzzle."""
    train: list[str] = []
    held_out: list[str] = []
    seen: set[bytes] = set()
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        key = text_key(text)
        if not 64 <= len(text) <= 2_000_000 or key in seen:
            continue
        seen.add(key)
        (held_out if is_held_out(key) else train).append(text)
    return train, held_out


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, pad_token=PAD)
    fast.model_max_length = T
    return fast


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """One stream of token ids, each document opened by EOS. [num_tokens] uint16"""
    groups = (texts[start : start + 2048] for start in range(0, len(texts), 2048))
    documents = (ids for group in groups for ids in tokenizer(group, verbose=False)["input_ids"])
    return np.concatenate([np.array([tokenizer.eos_token_id, *ids], dtype=np.uint16) for ids in documents])


def batches(stream: torch.Tensor, num_sequences: int, seed: int):
    """Endless [B, T + 1] batches: each epoch shifts the window grid and visits it in a new order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        shift = int(torch.randint(T, (1,), generator=generator))
        windows = (len(stream) - 1 - shift) // T
        order = torch.randperm(windows, generator=generator)
        for i in range(0, windows - num_sequences + 1, num_sequences):
            starts = (order[i : i + num_sequences] * T + shift).to(stream.device)
            yield stream[starts[:, None] + torch.arange(T + 1, device=stream.device)].long()


@torch.no_grad()
def total_nats(model: Any, stream: torch.Tensor, num_sequences: int = 32) -> float:
    """Sum of next-token losses over the whole stream, in windows of T without overlap (the harder count)."""
    nats = 0.0
    windows = [stream[i : i + T + 1] for i in range(0, len(stream) - 1, T)]
    for _, alike in groupby(windows, key=len):  # the last one is shorter
        for batch in torch.stack(list(alike)).long().split(num_sequences):
            logits = model(batch[:, :-1]).logits.float()
            nats += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return nats


def completions(model: Any, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    torch.manual_seed(0)
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").to(model.device)
        out = model.generate(
            input_ids=ids["input_ids"],
            attention_mask=ids["attention_mask"],
            max_new_tokens=96,
            do_sample=True,
            temperature=0.6,
            top_p=0.95,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts.append(tokenizer.decode(out[0], skip_special_tokens=True))
    return texts


def model_card(family: str, facts: dict[str, str], samples: list[str], licences: dict[str, str]) -> str:
    rows = "\n".join(f"| {k} | {v} |" for k, v in facts.items())
    shown = "\n\n".join(f"```python\n{s}\n```" for s in samples)
    names = ", ".join(f"{n} ({lic})" for n, lic in sorted(licences.items(), key=lambda x: x[0].lower()))
    title, what = TITLES[family]
    return f"""---
license: apache-2.0
language: code
tags: [puzzle, reference-parent]
---
# {title}

{what} trained on Python source, so that every stage of `puzzle` can be shown and tested on a real
language model without a download. It is no coding assistant.

| measured | |
|---|---|
{rows}

Samples (temperature 0.6, top-p 0.95, seed 0; the first words are the prompt):

{shown}

Trained on the permissively licensed Python files of: {names}.
"""


def dense(tokenizer: PreTrainedTokenizerFast, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=T,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # residual writers start smaller: depth-scaled init, as in GPT-2
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.div_(math.sqrt(2 * layers))
    return model


def train(
    model: Any, stream: torch.Tensor, *, batch: int, lr: float, num_steps: int, seconds: float | None, seed: int
) -> tuple[list[tuple], torch.Tensor | None]:
    """Until `num_steps` or `seconds`. Returns the rows of training.csv, and of a mixture the load of each layer's experts in the last step."""
    is_dense = isinstance(model, LlamaForCausalLM)
    learnt = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in learnt if p.ndim > 1]
    vectors = [p for p in learnt if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.95),
        fused=stream.is_cuda,
    )

    def loss_fn(batch_ids: torch.Tensor) -> torch.Tensor:
        # on a CPU without bf16 of its own it takes 50 times as long as float32
        with torch.autocast(stream.device.type, dtype=torch.bfloat16, enabled=stream.is_cuda):
            logits = model(batch_ids[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), batch_ids[:, 1:].flatten())

    step_fn = torch.compile(loss_fn) if stream.is_cuda else loss_fn
    data = batches(stream, batch, seed)
    log = [("step", "tokens", "loss", "lr", "seconds", *([] if is_dense else ["busiest expert's load"]))]
    clock, step, done, load = time.time(), 0, 0.0, None
    while done < 1:
        step += 1
        if step == 11:  # compilation is behind us
            clock = time.time()
        spent = (time.time() - clock) / seconds if seconds and step > 11 else 0.0
        done = max(step / num_steps, spent)
        rate = lr * min(1.0, step / WARM_UP) * min(1.0, max(1 - done, 1 / num_steps) / 0.8)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if is_dense:
            loss = step_fn(next(data))
        else:
            loss, load = model.loss(next(data))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if load is not None:
            model.balance(load)
        if step % 100 == 0 or step in (1, 30) or done >= 1:
            busiest = [] if load is None else [f"{load.max().item() * load.shape[1]:.2f}"]
            row = (step, step * batch * T, f"{loss.item():.4f}", f"{rate:.2e}", f"{time.time() - clock:.1f}", *busiest)
            log.append(row)
            print(*row, flush=True)
    return log, load


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--family", type=click.Choice(list(TITLES)), default="llama", show_default=True)
@click.option("--tokens", type=float, default=600e6, show_default=True, help="Training tokens.")
@click.option("--seconds", type=float, default=None, help="End after so many seconds of training, if not by --tokens.")
@click.option("--batch", type=int, default=128, show_default=True, help="Sequences of 1024 tokens a step.")
@click.option("--lr", type=float, default=3e-3, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--max-files", type=int, default=None, help="Use only the first files (for a rehearsal).")
@click.option("--length", type=int, default=None, help="Tokens of a sequence, in place of 1024 (for a rehearsal).")
@click.option("--layers", type=int, default=None, help="16, 10 of qwen3_moe; of nemotron_h_moe the first of 18 blocks.")
def main(
    out: Path,
    family: str,
    tokens: float,
    seconds: float | None,
    batch: int,
    lr: float,
    seed: int,
    max_files: int | None,
    length: int | None,
    layers: int | None,
) -> None:
    """Train the reference parent of --family and write it to --out."""
    given = {"tokens": tokens, "seconds": seconds, "batch": batch, "lr": lr, "max-files": max_files, "length": length}
    for name, value in {**given, "layers": layers}.items():  # before minutes of reading
        if value is not None and not 0 < value < math.inf:
            raise click.ClickException(f"--{name} {value:g}: must be above 0")
    if length is not None:
        globals()["T"] = length
    started = time.time()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    files, licences = corpus_files()
    train_texts, held_texts = read_documents(files[:max_files])
    if not (train_texts and held_texts):
        told = (
            f"{len(train_texts)} documents to train on and {len(held_texts)} held out of {len(files[:max_files])} files"
        )
        raise click.ClickException(f"{told}: a parent needs both; give more --max-files")
    num_bytes = sum(len(t.encode()) for t in train_texts)
    print(f"{len(train_texts)} train files, {num_bytes / 1e6:.1f} MB, {len(held_texts)} held out", flush=True)
    sample = train_texts if num_bytes < 120e6 else train_texts[:: math.ceil(num_bytes / 120e6)]
    tokenizer = train_tokenizer(sample)
    print(f"tokenizer ready after {time.time() - started:.0f} s", flush=True)
    stream = torch.from_numpy(tokenize(tokenizer, train_texts)).to(torch.int32).to(device)
    held = torch.from_numpy(tokenize(tokenizer, held_texts)).to(torch.int32).to(device)
    held_bytes = "".join(held_texts).encode()
    print(
        f"{len(stream) / 1e6:.1f} M train tokens ({num_bytes / len(stream):.2f} bytes/token), "
        f"{len(held) / 1e6:.2f} M held out, after {time.time() - started:.0f} s",
        flush=True,
    )

    model: nn.Module
    if family == "llama":
        layers = layers or 16
        model = dense(tokenizer, layers).to(device)
        sizes = f"{layers} layers, hidden 256, 8 heads, 4 KV heads, FFN 704, tied"
    else:
        import mixtures

        layers = layers or mixtures.NUM_LAYERS[family]
        structure = mixtures.structure_of(family, layers, VOCAB, T)
        active = structure.num_parameters - sum(b.num_parameters - b.active_parameters() for _, _, b in structure)
        sizes = f"{active:,} active; {layers} layers, hidden 256: {'; '.join(sorted({b.key() for _, _, b in structure if b.tensors()}))}"
        model = mixtures.Mixture(structure, compiled=device == "cuda").to(device)
    num_parameters = sum(p.numel() for p in model.parameters())
    log, load = train(
        model, stream, batch=batch, lr=lr, num_steps=max(1, int(tokens / (batch * T))), seconds=seconds, seed=seed
    )
    num_tokens = log[-1][1]
    facts = {"parameters": f"{num_parameters:,} ({sizes})"}
    if family == "llama":
        model = model.to(torch.bfloat16).eval()
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        whole = sampler = model
    else:
        from puzzle.runtime.model import load_model

        model.save(out, tokenizer)
        read = load_model(out, device=device, dtype=compute_dtype(torch.device(device)))
        ids = held[None, :128].long().cpu()
        sampler = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        whole = lambda ids: SimpleNamespace(logits=read(ids))  # noqa: E731
        with torch.no_grad():
            apart = (sampler(ids).logits - load_model(out)(ids)).abs().max().item()
        facts["largest difference from transformers' logits"] = f"{apart:.1e} (float32, CPU)"
        facts["load of the busiest expert, by layer"] = (
            ", ".join(f"{x:.2f}" for x in (load.max(-1).values * load.shape[1]).tolist())
            + " times its share (last step)"
        )
    nats = total_nats(whole, held)
    bits_per_byte = nats / math.log(2) / len(held_bytes)
    xz = 8 * len(lzma.compress(held_bytes, preset=9)) / len(held_bytes)
    train_nats = total_nats(whole, stream[: len(held)])
    gpu = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    options = "" if family == "llama" else f"--family {family} "
    facts |= {
        "training tokens": f"{num_tokens / 1e6:.0f} M ({num_tokens / len(stream):.1f} epochs of "
        f"{len(stream) / 1e6:.1f} M; {len(train_texts)} files, {num_bytes / 1e6:.0f} MB)",
        "held-out loss": f"{nats / (len(held) - 1):.4f} nats/token",
        "held-out bits per byte": f"{bits_per_byte:.4f} (bf16 weights; {len(held_texts)} files, "
        f"{len(held_bytes) / 1e6:.2f} MB)",
        "`xz -9` on the same files": f"{xz:.4f} bits per byte",
        "training-set loss, same count of tokens": f"{train_nats / (len(held) - 1):.4f} nats/token",
        "device": f"{gpu}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}",
        "wall time": f"{time.time() - started:.0f} s",
        "command": f"`python examples/train_parent.py {options}--out {out} --tokens {num_tokens} "
        f"--batch {batch} --lr {lr} --seed {seed}`",
    }
    with open(out / "training.csv", "w", newline="") as handle:
        csv.writer(handle, lineterminator="\n").writerows(log)
    for key, value in facts.items():
        print(f"{key}: {value}", flush=True)
    samples = completions(sampler, tokenizer)
    (out / "README.md").write_text(model_card(family, facts, samples, licences), encoding="utf-8")
    print("\n---\n".join(samples))
    print(f"{sum(f.stat().st_size for f in out.iterdir()) / 1e6:.1f} MB in {os.fspath(out)}")


if __name__ == "__main__":
    main()
