"""A block library at the shapes of a well-known parent with made-up scores, to try `solve` and `bench` without its weights.

Scores follow what libraries of real parents look like: convex in FFN width, attention cheap to lose in late layers, the first
and last layers dear; noise of 20 %, seeded. library.json says "synthetic_scores": true and every answer repeats it.

    python benchmarks/lib/synthetic_library.py llama-3.1-8b lib

What `puzzle bench` measured of two architectures that were solved so on a CPU (2026-11-26):

    puzzle solve lib --throughput 5x --gpu h100 --input-len 512 --output-len 256 && \\
        puzzle bench lib/solution --gpu h100 --with-parent --json > benchmarks/results/bench_throughput_5x.json
    puzzle solve lib --throughput 1.5x --latency 3s --gpu h100 --input-len 512 --output-len 256 && \\
        puzzle bench lib/solution --gpu h100 --json > benchmarks/results/bench_latency.json
"""

from __future__ import annotations

import random
from pathlib import Path

import click

from puzzle import __version__
from puzzle.base.files import content_hash, write_json
from puzzle.blocklib.variant import PARENT, search_spaces
from puzzle.library.manifest import SCHEMA, Space, scores_path
from puzzle.parents.known import known_structure

ATTENTION = "kv4,kv2,kv1,window-1024,linear,none"
FFN = "linear,none,0.75,0.5,0.25,0.1"
LOSS = {"kv4": 0.003, "kv2": 0.008, "kv1": 0.016, "window-1024": 0.012, "linear": 0.05, "none": 0.07}


def scores(num_layers: int, spaces: dict[str, Space], layer: int, chance: random.Random) -> dict:
    """{"attention/kv2": {"kl": ...}} of one layer."""
    depth = layer / (num_layers - 1)
    edge = 1 + 6 * (layer < 2) + 3 * (layer >= num_layers - 2)
    found = {}
    for slot, space in spaces.items():
        for name, sub_block in space.items():
            if space[PARENT].kind == "gqa":
                found[f"{slot}/{name}"] = LOSS.get(name, 0.0) * edge * (1.6 - 1.2 * depth)
            else:
                kept = {PARENT: 1.0, "linear": 0.06, "none": 0.0}.get(name)
                if kept is None:  # a width's name is what is kept of it
                    narrow = name.replace(".", "").isdigit()
                    kept = float(name) if narrow else sub_block.num_parameters / space[PARENT].num_parameters
                found[f"{slot}/{name}"] = 0.09 * edge * max(0.0, 1 - kept) ** 2
    return {
        name: {
            "kl": kl * chance.uniform(0.8, 1.2),
            "kl_stderr": 0.0,
            "lm_loss": 0.0,
            "top1_agreement": 0.0,
            "num_tokens": 0,
        }
        for name, kl in found.items()
        if not name.endswith(f"/{PARENT}")
    }


@click.command()
@click.argument("name")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", default=0)
@click.option(
    "--attention", default=ATTENTION, help="What is offered; KV heads that do not divide the parent's are left out."
)
@click.option("--ffn", default=FFN, help="Hybrids and mixtures are offered their defaults instead of both.")
def main(name: str, out: Path, seed: int, attention: str, ffn: str) -> None:
    structure = known_structure(name)
    offered: dict[str, str] = {}
    if {sub_block.kind for _, _, sub_block in structure} == {"gqa", "swiglu"}:
        most = max(layer["attention"].num_key_value_heads for layer in structure.layers)
        every = attention.split(",")
        heads = [v for v in every if not v.startswith("kv") or (int(v[2:]) < most and most % int(v[2:]) == 0)]
        offered = {"attention": ",".join(heads), "ffn": ffn}
    spaces = search_spaces(dict(enumerate(structure.layers)), offered)
    chosen = {
        str(layer): {
            slot: {variant: sub_block.key() for variant, sub_block in space.items() if variant != PARENT}
            for slot, space in slots.items()
        }
        for layer, slots in spaces.items()
    }
    out.mkdir(parents=True, exist_ok=True)
    facts = {
        "puzzle": __version__,
        "synthetic_scores": True,
        "parent": {"source": name, "relative": False, "name": name, "fingerprint": content_hash({"synthetic": name}), "config_hash": ""},
        "structure": structure.to_json(),
        "data": {"hash": "", "num_documents": 0, "num_sequences": 0, "seq_len": 0},
        "recipe": {},
        "seed": seed,
        "layers": chosen,
    }  # fmt: skip
    write_json(out / "library.json", facts, SCHEMA)
    chance = random.Random(seed)
    for layer, slots in spaces.items():
        write_json(scores_path(out, layer), {"scores": scores(structure.num_layers, slots, layer, chance)})
    print(f"wrote {out}: {structure.num_layers} layers of {name}, scores are synthetic")


if __name__ == "__main__":
    main()
