"""Block-local distillation at Llama-3.1-8B shapes on one GPU: predicted against measured memory, time and FLOPs.

Protocol: a parent of random weights with Llama-3.1-8B's layer shapes (hidden 4096, 32 heads, 8 KV heads, FFN 14336,
vocabulary 128256) and --num-layers layers is written; the default search space of --layers is trained on --tokens
tokens of text under --memory-limit. Speed is that of the training steps, first ones and graph capture included.
MFU counts the FLOPs of `puzzle.library.plan.training_flops` against --peak-flops (dense bf16 by the datasheet).

    python benchmarks/speed/bench_build_8b.py --data /usr/lib/python3.12 --tokenizer examples/parent --num-layers 6 \\
        --layers 0-5 --tokens 2.5e5 --memory-limit 40GB --out benchmarks/results/build_8b.csv
"""

from __future__ import annotations

import csv
import json
import shutil
import tempfile
import time
from pathlib import Path

import click
import torch
from safetensors.torch import save_file

from puzzle.base.units import parse_bytes
from puzzle.blocklib.layer import attention_shapes, ffn_shapes
from puzzle.library.build import Builder, BuildOptions
from puzzle.library.estimate import predict_seconds
from puzzle.parents.family import hf_name, open_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}


def write_parent(directory: Path, tokenizer: Path, num_layers: int) -> None:
    """A checkpoint of random bf16 weights, one file a layer."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": num_layers}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, directory / name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    hidden, vocab = CONFIG["hidden_size"], CONFIG["vocab_size"]
    weight_map: dict[str, str] = {}

    def save(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {
            n: torch.ones(s, dtype=torch.bfloat16)
            if len(s) == 1
            else (torch.randn(s, device=device, dtype=torch.bfloat16) * 0.02).cpu()
            for n, s in shapes.items()
        }
        save_file(tensors, directory / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    save(
        "fixed.safetensors",
        {
            "model.embed_tokens.weight": (vocab, hidden),
            "lm_head.weight": (vocab, hidden),
            "model.norm.weight": (hidden,),
        },
    )
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    spec = open_model(directory).spec
    for index in range(num_layers):
        shapes = {hf_name(index, "attention", n): s for n, s in attention_shapes(spec).items()}
        shapes |= {hf_name(index, "ffn", n): s for n, s in ffn_shapes(spec).items()}
        save(f"layer-{index:02d}.safetensors", shapes)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@click.command()
@click.option("--data", required=True, multiple=True)
@click.option("--tokenizer", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--num-layers", type=int, default=11, show_default=True)
@click.option("--layers", default="0-10", show_default=True)
@click.option("--tokens", type=float, default=2.5e5, show_default=True)
@click.option("--seq-len", type=int, default=2048, show_default=True)
@click.option("--batch-size", type=int, default=4, show_default=True)
@click.option("--memory-limit", default="80GB", show_default=True)
@click.option("--peak-flops", type=float, default=1189e12, show_default=True)
def main(
    data: tuple[str, ...],
    tokenizer: Path,
    out: Path,
    num_layers: int,
    layers: str,
    tokens: float,
    seq_len: int,
    batch_size: int,
    memory_limit: str,
    peak_flops: float,
) -> None:
    with tempfile.TemporaryDirectory() as work:
        begin = time.time()
        write_parent(Path(work) / "parent", tokenizer, num_layers)
        print(f"parent written in {time.time() - begin:.0f} s", flush=True)
        options = BuildOptions(
            data=list(data),
            out=Path(work) / "lib",
            layers=layers,
            tokens=int(tokens),
            seq_len=seq_len,
            batch_size=batch_size,
            memory_limit=parse_bytes(memory_limit),
            calibration_sequences=16,
            validation_sequences=4,
            snapshot_seconds=1e9,
        )
        builder = Builder(open_model(Path(work) / "parent"), options)
        plan = builder.plan()
        predicted_seconds = predict_seconds(builder, plan)
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        print(
            f"plan: groups {plan.groups}, {plan.peak_memory_bytes / 1e9:.1f} GB, {predicted_seconds:.1f} s", flush=True
        )
        builder.run(builder.load_data())
        measured = builder.train_seconds
        peak = torch.cuda.max_memory_reserved() if cuda else 0
        disk = sum(f.stat().st_size for f in (Path(work) / "lib").rglob("*") if f.is_file())
        rows = [
            ("peak_memory_bytes", plan.peak_memory_bytes, peak),
            ("training_seconds", round(predicted_seconds, 1), round(measured, 1)),
            ("tokens_per_second", round(plan.num_tokens / predicted_seconds), round(plan.num_tokens / measured)),
            (
                "mfu",
                round(plan.flops / predicted_seconds / peak_flops, 4),
                round(plan.flops / measured / peak_flops, 4),
            ),
            ("library_bytes", plan.disk_bytes - len(plan.groups[0]) * plan.trained_parameters_per_layer * 12, disk),
        ]
    name = torch.cuda.get_device_name() if cuda else "cpu"
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(("quantity", "predicted", "measured", "layers", "groups", "tokens", "device", "torch", "date"))
        for row in rows:
            writer.writerow(
                (*row, layers, len(plan.groups), plan.num_tokens, name, torch.__version__, time.strftime("%Y-%m-%d"))
            )
            print(*row, flush=True)


if __name__ == "__main__":
    main()
