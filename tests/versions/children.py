"""Children that one environment exports and another one generates with: `run.py` calls this with the Python of each.

    python tests/versions/children.py write DIRECTORY CHECKOUT    tiny children in both formats, by the code of CHECKOUT
    python tests/versions/children.py again DIRECTORY OUT         each of them through `puzzle export`
    python tests/versions/children.py check DIRECTORY …           a line of JSON for each: {child: what generates wrong text}

What they should generate stands beside them (`expected.json`): tokens of the writer's plain forward of whole sequences,
greedy and in beams. `check` loads a child as its users do, with the code in its directory, and generates with a cache,
without, in a batch that is padded on the left, and in beams.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

CHILDREN = ("no-attention-first", "empty-layers", "linear-attention", "linear-ffn", "window")
FORMATS = ("hf", "nemotron-nas")
LENGTHS, NUM_NEW, NUM_BEAMS, PAD = (7, 24), 12, 3, 1
OPTIONS = {"do_sample": False, "max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW, "pad_token_id": PAD}


def prompts() -> list[Tensor]:
    """[1, T] each; ids from 2 on, so that none of them is padding."""
    return [torch.randint(2, 384, (1, n), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]


def load(directory: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def plain_beams(model: Any, ids: Tensor, num_beams: int) -> list[int]:
    """The likeliest of `num_beams` sequences that each step keeps, from forwards without a cache; 1 is greedy."""
    start, totals = ids.shape[1], torch.zeros(1)
    for _ in range(NUM_NEW):
        scores = totals[:, None] + model(ids, use_cache=False).logits[:, -1].log_softmax(-1)
        totals, best = scores.flatten().topk(num_beams)
        parents, added = best // scores.shape[1], best % scores.shape[1]
        ids = torch.cat((ids[parents], added[:, None]), dim=1)
    return ids[0, start:].tolist()


def write(directory: Path, checkout: Path) -> None:
    """Every child as `directory/<format>/<name>`. checkout: its packages are imported."""
    sys.path[:0] = [str(checkout), str(checkout / "benchmarks" / "lib"), str(checkout / "benchmarks")]
    writing, children = importlib.import_module("puzzle.export.write"), importlib.import_module("tiny_children")
    for name in CHILDREN:
        source = children.write_tiny_child(name, directory / "hf" / name)
        engine = "vllm" if name == "window" else None  # the only reader of nemotron-nas that takes a window
        out = directory / "nemotron-nas" / name
        writing.export(writing.open_source(source), out, format="nemotron-nas", engine=engine)
    expected: dict[str, dict[str, list[list[int]]]] = {}
    for format in FORMATS:
        for name in CHILDREN:
            model = load(directory / format / name)
            expected[f"{format}/{name}"] = {
                kind: [plain_beams(model, ids, beams) for ids in prompts()]
                for kind, beams in (("greedy", 1), ("beams", NUM_BEAMS))
            }
    (directory / "expected.json").write_text(json.dumps(expected))


def again(directory: Path, out: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    writing = importlib.import_module("puzzle.export.write")
    for format in FORMATS:
        for name in CHILDREN:
            engine = "vllm" if (format, name) == ("nemotron-nas", "window") else None
            writing.export(
                writing.open_source(directory / format / name), out / format / name, format=format, engine=engine
            )
    (out / "expected.json").write_text((directory / "expected.json").read_text())


def mistakes(model: Any, expected: dict[str, list[list[int]]]) -> list[str]:
    """The ways of generating that give other tokens than `expected`, or fail."""
    longest = max(LENGTHS)
    ids = torch.cat([torch.nn.functional.pad(p, (longest - p.shape[1], 0), value=PAD) for p in prompts()])
    ways = {
        "cache": lambda: [model.generate(p, **OPTIONS)[0, p.shape[1] :] for p in prompts()],
        "no cache": lambda: [model.generate(p, use_cache=False, **OPTIONS)[0, p.shape[1] :] for p in prompts()],
        "padded": lambda: model.generate(ids, attention_mask=(ids != PAD).long(), **OPTIONS)[:, longest:],
        "beams": lambda: model.generate(ids, attention_mask=(ids != PAD).long(), num_beams=NUM_BEAMS, **OPTIONS)[
            :, longest:
        ],
    }
    wrong = []
    for way, generate in ways.items():
        try:
            tokens = [row.tolist() for row in generate()]
        except (TypeError, ValueError) as error:
            wrong.append(f"{way} ({type(error).__name__})")
        else:
            wrong += [] if tokens == expected["beams" if way == "beams" else "greedy"] else [way]
    return wrong


def check(*directories: Path) -> None:
    for directory in directories:
        expected = json.loads((directory / "expected.json").read_text())
        print(json.dumps({name: mistakes(load(directory / name), tokens) for name, tokens in expected.items()}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    verb, *paths = sys.argv[1:]
    {"write": write, "again": again, "check": check}[verb](*(Path(path).resolve() for path in paths))
