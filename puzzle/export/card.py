"""The child's model card: how it was made and is served, and numbers that say whether they are predicted or measured."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from puzzle import __version__
from puzzle.base.files import json_text
from puzzle.base.units import bytes_text
from puzzle.blocklib.mamba2 import Mamba2
from puzzle.blocklib.moe import Moe
from puzzle.export.child import Child
from puzzle.export.engines import ENGINES, HYBRIDS, PUZZLE_HYBRID, SCALES_FROM, STOCK, served_by
from puzzle.export.picture import picture
from puzzle.measure.architecture import Architecture


@dataclass(frozen=True, kw_only=True, slots=True)
class CardFacts:
    """All that a card says. child: as written; original: before any rewrite; file: the .gguf file's name.

    also: other engines that read the checkpoint as it is. solved: architecture.json; facts: library.json; measured: as
    `puzzle evaluate --json` prints it.
    """

    child: Child
    original: Child
    dtype: str
    licence: str | None
    solved: Architecture | None
    format: str = "hf"
    engine: str | None = None
    kv_dtype: str | None = None
    file: str | None = None
    lowerings: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    facts: dict[str, Any] | None = None
    measured: dict[str, Any] | None = None


def plain_card(child: Child, solved: Architecture | None) -> str:
    """The card of a child in its own format and dtype, nothing rewritten. solved: predictions that hold for it."""
    facts = CardFacts(child=child, original=child, dtype=child.dtype_name, licence=child.licence, solved=solved)
    return child_card(facts)


def child_card(card: CardFacts) -> str:
    """Markdown with the Hub's front matter."""
    parts = [
        _front(card),
        f"# A child of {card.child.parent_name}",
        _origin(card),
        _picture(card.original, card.solved),
    ]
    parts += [_predicted(card.solved, _as_solved(card))] if card.solved else []
    parts += [_measured(card.measured)] if card.measured else []
    parts += [_recipe(card.facts)] if card.facts else []
    if card.lowerings:
        reader = card.engine or f"readers of {card.format}"
        lines = "\n".join(f"- {line}" for line in card.lowerings)
        parts.append(f"## Rewritten for {reader}\n\nExactly: the logits are the same.\n\n{lines}")
    parts.append("## Serve\n\n" + "\n\n".join(_serve(card)))
    return "\n\n".join(parts) + "\n"


def _front(card: CardFacts) -> str:
    parent = card.child.parent_name
    library = {"gguf": "gguf"}.get(card.format, "transformers")
    lines = [
        "---",
        *([f"license: {card.licence}"] if card.licence else []),
        *([f"base_model: {parent}"] if parent.count("/") == 1 else []),
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        "tags: [puzzle]",
        "---",
    ]
    return "\n".join(lines)


def _origin(card: CardFacts) -> str:
    goal = ""
    if card.solved:
        wanted = {k: v for k, v in card.solved.goal.items() if v is not None}
        work = card.solved.workload
        goal = f" for the goal `{json_text(wanted, indent=None)}` at {work.input_len} input and {work.output_len} output tokens"
    licence = (
        f"The parent's licence, {card.licence}, holds for the child too."
        if card.licence
        else "The parent's licence holds for the child too; its checkpoint does not name one."
    )
    return (
        f"Made by [puzzle](https://pypi.org/project/puzzle-nas/) {__version__}{goal}. Format {card.format}, "
        f"{card.dtype}, {card.child.num_parameters:,} parameters. {licence}{_quantised(card)}"
    )


def _quantised(card: CardFacts) -> str:
    """What is in fp8, and how to know what that costs."""
    told = ""
    if card.dtype == "fp8":
        told = (
            f"Every matrix of a layer{_but(card.child)} is float8_e4m3fn with a scale per output channel (compressed-tensors, float-quantized); engines "
            "quantise activations per token as they come. Embedding, LM head, norms and biases are bf16. What the weights' "
            "rounding costs is the KL that `puzzle evaluate PARENT PATH` measures, beside that of the same child in bf16; it "
            "leaves activations as they are."
        )
    if card.kv_dtype is not None:
        told += f"{' ' if told else ''}The cache is meant for fp8: scales of keys and values, one per layer, come from text."
    return f"\n\n{told}" if told else ""


def _but(child: Child) -> str:
    kept = [f"{index} {slot}" for index, layer in enumerate(child.layers) for slot in layer.in_bf16]
    return f", but for layers {', '.join(kept)}," if kept else ""


def _picture(child: Child, solved: Architecture | None) -> str:
    """The architecture, a column per layer, and the same counted."""
    layers = [layer.slots for layer in child.layers]
    theirs = [child.base] * len(layers) if solved is None else solved.parent.layers
    parents = [theirs[layer.stands_for] if solved else child.base for layer in child.layers]
    slots = list(dict.fromkeys(slot for layer in layers for slot in layer))
    words = [
        tuple(layer[slot].words(parent[slot]) if slot in layer else "" for slot in slots)
        for layer, parent in zip(layers, parents, strict=True)
    ]
    rows = "\n".join(f"| {number} | {' | '.join(found)} |" for found, number in Counter(words).most_common())
    drawn = "\n".join(picture(layers, parents))
    head = f"| layers | {' | '.join(slots)} |\n|{'---|' * (len(slots) + 1)}"
    return f"## Architecture\n\n```\n{drawn}\n```\n\n{head}\n{rows}"


def _as_solved(card: CardFacts) -> bool:
    """Whether weights and cache are in the precisions that were chosen; True where none was."""
    solved = card.solved
    if solved is None or solved.kv_dtype is None:
        return True
    layers = list(enumerate(card.original.layers)) if card.dtype == "fp8" else []
    fp8 = {(i, slot) for i, layer in layers for slot in layer.slots if slot not in layer.bf16}
    return fp8 == solved.fp8_weights and (card.kv_dtype == "fp8") == (solved.kv_dtype == "fp8")


def _predicted(solved: Architecture, as_solved: bool) -> str:
    child, parent = solved.predicted, solved.parent_predicted
    rows = [
        ("tokens/s", f"{child.tokens_per_second:.5g}", f"{parent.tokens_per_second:.5g}"),
        ("batch", child.batch, parent.batch),
        ("time to first token, s", f"{child.ttft_seconds:.4g}", f"{parent.ttft_seconds:.4g}"),
        ("time per output token, s", f"{child.tpot_seconds:.4g}", f"{parent.tpot_seconds:.4g}"),
        ("memory", bytes_text(child.memory_bytes), bytes_text(parent.memory_bytes)),
        ("KV bytes per token", child.kv_bytes_per_token, parent.kv_bytes_per_token),
        *([("state bytes per sequence", child.state_bytes, parent.state_bytes)] if parent.state_bytes else []),
        ("parameters", f"{child.num_parameters:,}", f"{parent.num_parameters:,}"),
    ]
    head = f"predicted on {solved.costs['device']}, {solved.precision}"
    runs = ", ".join(f"{first}-{last}" for first, last in solved.fuse or ())
    fused = f"These figures are for layers {runs} fused, which `puzzle fuse` does.\n\n" if runs else ""
    fused += "" if as_solved else "This checkpoint is in other precisions than those that these figures are for.\n\n"
    return (
        f"## Predicted\n\n{_table(head, rows)}\n\n{fused}"
        f"The sum of the replaced blocks' own KL divergences, measured one at a time, is {solved.objective:.4f} nats "
        f"per token (solver: {solved.status}, {solved.certificate}, {solved.solver}). The whole child's KL is "
        "what `puzzle evaluate` measures."
    )


def _measured(found: dict[str, Any]) -> str:
    child, parent = found["child"], found["parent"]
    rows = [
        ("held-out loss, nats/token", f"{child['loss']:.4f}", f"{parent['loss']:.4f}"),
        ("KL(parent‖child), nats/token", f"{child['kl']:.4f} ± {child['kl_stderr']:.4f}", "0"),
        ("top-1 agreement", f"{child['top1_agreement']:.4f}", "1"),
        ("parameters", f"{child['num_parameters']:,}", f"{parent['num_parameters']:,}"),
    ]
    if "speedup" in found:
        rows += [
            ("tokens/s", f"{child['tokens_per_second']:.5g}", f"{parent['tokens_per_second']:.5g}"),
            ("batch", str(child["batch"]), str(parent["batch"])),
        ]
    head = f"measured on {found['device']}, {found['dtype']}, {found['num_tokens']:,} tokens"
    return f"## Measured\n\n{_table(head, rows)}"


def _table(head: str, rows: list[tuple[Any, ...]]) -> str:
    lines = "\n".join(f"| {name} | {ours} | {theirs} |" for name, ours, theirs in rows)
    return f"| {head} | child | parent |\n|---|---|---|\n{lines}"


def _recipe(facts: dict[str, Any]) -> str:
    recipe, data = facts["recipe"], facts["data"]
    tokens = recipe["num_steps"] * recipe["batch_size"] * recipe["seq_len"]
    return (
        f"## Recipe\n\nBlock-local distillation on {tokens:,} tokens of {data['num_documents']:,} documents, in sequences of "
        f"{recipe['seq_len']}, learning rate {recipe['lr']:g}, data hash `{data['hash'][:16]}`, parent fingerprint "
        f"`{facts['parent']['fingerprint'][:16]}`."
    )


FENCE = "\n```"
_TRANSFORMERS = """:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=False)
```"""

# PATH stands for this directory or its name on the hub. Each command was taken from the engine's own help.
_COMMANDS = {
    "vllm": "vLLM:\n\n```\nvllm serve PATH --trust-remote-code\n```",
    "llama.cpp": "llama.cpp, converted by its own script:\n\n```\npython convert_hf_to_gguf.py PATH --outfile "
    "child.gguf\nllama-server -m child.gguf\n```",
    "mlx": "mlx-lm:\n\n```\nmlx_lm.server --model PATH --trust-remote-code\n```",
    "sglang": "SGLang:\n\n```\npython -m sglang.launch_server --model-path PATH --trust-remote-code\n```",
    "tensorrt-llm": "TensorRT-LLM:\n\n```\ntrtllm-serve PATH --trust_remote_code\n```",
}


_PLUG_IN = (
    f"vLLM {ENGINES['vllm'].plug_in} to {(ENGINES['vllm'].read or ('',))[-1]}, through puzzle's plug-in (`pip install 'puzzle-nas[vllm]'`), "
    "whatever the layers' numbers of KV heads:\n\n```\nvllm serve PATH\n```"
)
_CACHE = {"vllm": " --kv-cache-dtype fp8", "sglang": " --kv-cache-dtype fp8_e4m3"}  # where the checkpoint has scales


def _command(card: CardFacts, engine: str) -> str:
    """With the dtype of the cache, where its scales are there, and the versions that serve it."""
    found, versions = _COMMANDS[engine], served_by(ENGINES[engine], card.child.kv_heads)
    if card.kv_dtype is not None:
        found = f"{found.removesuffix(FENCE)}{_CACHE[engine]}{FENCE}"
    return f"{found}\n\n{versions[0].upper()}{versions[1:]}." if versions else found


def _transformers(card: CardFacts) -> str:
    needs = "transformers ≥ 5.14"
    if "fp8" in (card.dtype, card.kv_dtype):
        needs += f" and compressed-tensors ≥ {0.18 if card.kv_dtype else 0.15} (`pip install compressed-tensors`)"
    return f"{needs}{_TRANSFORMERS}"


def _state_dtype(child: Child) -> str:
    """What tells vLLM the dtype of Mamba-2's states, where a config has no word for it: else it takes that of activations."""
    dtypes = {b.state_dtype for b in child.sub_blocks if isinstance(b, Mamba2)}
    return "".join(f" --mamba-ssm-cache-dtype {dtype}" for dtype in sorted(dtypes))


def _serve(card: CardFacts) -> list[str]:
    """Exact commands of the engines that read this very checkpoint."""
    if card.format == "gguf":
        return [f"llama.cpp:\n\n```\nllama-server -m PATH/{card.file}\n```"]
    gateless = any(isinstance(b, Moe) and b.activation == "relu2" for b in card.child.sub_blocks)
    if card.format == "hf":
        again = (
            "Other engines: `puzzle export PATH --engine vllm --out OTHER` (or llama.cpp, mlx, sglang, tensorrt-llm)."
        )
        served = not any(b.lacks_in_vllm for b in card.child.sub_blocks)
        return [_transformers(card), *([_PLUG_IN, again] if served else [])]
    if card.format in STOCK:
        name = {"qwen3-moe": "Qwen3-MoE", "gpt-oss": "gpt-oss"}.get(card.format, "Granite-4")
        more = _state_dtype(card.child)
        if card.kv_dtype is not None:
            return [f"vLLM ≥ {SCALES_FROM}, without code of ours:\n\n```\nvllm serve PATH{more}{_CACHE['vllm']}\n```"]
        return [
            f"Whatever reads {name}, without code of ours: transformers, or vLLM:\n\n```\nvllm serve PATH{more}\n```"
        ]
    if card.format in HYBRIDS:
        trust = " --trust-remote-code" if card.format == PUZZLE_HYBRID else ""
        again = "For a reader of another format: write the child again with `puzzle export … --format` and its name."
        vllm = f"vLLM, of which 0.32 was read{'' if gateless else ' and run'}:\n\n```\nvllm serve PATH{trust}\n```"
        return [vllm, _transformers(card).replace("5.14", "5.17"), again]
    engines = [card.engine] if card.engine else list(card.also)
    rest = [name for name in _COMMANDS if name not in engines]
    again = f"For {', '.join(rest)}: write the child again with `puzzle export … --engine` and that name."
    return [*(_command(card, name) for name in engines), _transformers(card), *([again] if rest else [])]
