"""A block library at the shapes of a well-known parent with made-up scores, to try `solve` and `bench` without its weights.

Scores follow what libraries of real parents look like: convex in FFN width, attention cheap to lose in late layers, the first
and last layers dear; noise of 20 %, seeded. library.json says "synthetic_scores": true and every answer repeats it.

    python benchmarks/lib/synthetic_library.py llama-3.1-8b lib

What `puzzle bench` measured of two architectures that were solved so on a CPU (2026-11-26):

    puzzle solve lib --throughput 5x --gpu h100 --input-len 512 --output-len 256 && \\
        puzzle bench lib/solution --gpu h100 --shapes llama-3.1-8b --with-parent --json > benchmarks/results/bench_throughput_5x.json
    puzzle solve lib --throughput 1.5x --latency 3s --gpu h100 --input-len 512 --output-len 256 && \\
        puzzle bench lib/solution --gpu h100 --shapes llama-3.1-8b --json > benchmarks/results/bench_latency.json
"""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path

import click

from puzzle import __version__
from puzzle.base.files import content_hash, write_json
from puzzle.blocklib.variant import search_space
from puzzle.library.describe import describe_variant
from puzzle.parents.known import named_shapes

ATTENTION = "kv4,kv2,kv1,window-1024,linear,none"
LOSS = {"parent": 0.0, "kv4": 0.003, "kv2": 0.008, "kv1": 0.016, "window-1024": 0.012, "linear": 0.05, "none": 0.07}


def scores(num_layers: int, space: dict, layer: int, chance: random.Random) -> dict:
    """{"attention/kv2": {"kl": ...}} of one layer."""
    depth = layer / (num_layers - 1)
    edge = 1 + 6 * (layer < 2) + 3 * (layer >= num_layers - 2)
    found = {}
    for name in space["attention"]:
        found[f"attention/{name}"] = LOSS[name] * edge * (1.6 - 1.2 * depth)
    for name in space["ffn"]:
        kept = {"parent": 1.0, "linear": 0.06, "none": 0.0}.get(name)
        kept = float(name) if kept is None else kept
        found[f"ffn/{name}"] = 0.09 * edge * (1 - kept) ** 2
    return {
        name: {
            "kl": kl * chance.uniform(0.8, 1.2),
            "kl_stderr": 0.0,
            "lm_loss": 0.0,
            "top1_agreement": 0.0,
            "num_tokens": 0,
        }
        for name, kl in found.items()
        if not name.endswith("/parent")
    }


@click.command()
@click.argument("name")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", default=0)
def main(name: str, out: Path, seed: int) -> None:
    shapes = named_shapes(name)
    spec = shapes.spec
    heads = [v for v in ATTENTION.split(",") if not v.startswith("kv") or int(v[2:]) < spec.num_key_value_heads]
    space = search_space(spec, ",".join(heads), None)
    embedding = shapes.vocab_size * spec.hidden_size
    kept = {k: v for k, v in asdict(spec).items() if k != "inv_freq"}
    out.mkdir(parents=True, exist_ok=True)
    facts = {
        "puzzle": __version__,
        "synthetic_scores": True,
        "parent": {"source": name, "relative": False, "name": name, "fingerprint": content_hash({"synthetic": name}), "config_hash": ""},
        "model": {
            "num_layers": shapes.num_layers,
            "vocab_size": shapes.vocab_size,
            "max_length": shapes.max_length,
            "tied": shapes.tied,
            "num_fixed_parameters": embedding * (1 if shapes.tied else 2) + spec.hidden_size,
            "head_shape": f"h{spec.hidden_size} v{shapes.vocab_size}",
            "spec": kept,
        },
        "data": {"hash": "", "num_documents": 0, "num_sequences": 0, "seq_len": 0},
        "recipe": {},
        "seed": seed,
        "layers": list(range(shapes.num_layers)),
        "variants": {kind: {v: describe_variant(kind, v, spec) for v in names} for kind, names in space.items()},
    }  # fmt: skip
    write_json(out / "library.json", facts)
    chance = random.Random(seed)
    for layer in range(shapes.num_layers):
        write_json(out / "scores" / f"L{layer:02d}.json", {"scores": scores(shapes.num_layers, space, layer, chance)})
    print(f"wrote {out}: {shapes.num_layers} layers of {name}, scores are synthetic")


if __name__ == "__main__":
    main()
