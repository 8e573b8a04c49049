"""The child's model card: how it was made, and numbers that say whether they are predicted or measured."""

from __future__ import annotations

import json
from typing import Any

from puzzle import __version__
from puzzle.console import bytes_text
from puzzle.library import Library
from puzzle.picture import picture


def child_card(library: Library, solved: dict[str, Any], licence: str | None = None) -> str:
    """Markdown with the Hub's front matter. solved: architecture.json"""
    facts = library.facts
    child, parent = solved["predicted"], solved["parent_predicted"]
    work, recipe = solved["workload"], facts["recipe"]
    goal = {k: v for k, v in solved["goal"].items() if v is not None}
    front = [
        "---",
        *([f"license: {licence}"] if licence else []),
        "library_name: transformers",
        "tags: [puzzle]",
        "---",
    ]
    rows = [
        ("tokens/s", f"{child['tokens_per_second']:.5g}", f"{parent['tokens_per_second']:.5g}"),
        ("batch", child["batch"], parent["batch"]),
        ("time to first token, s", f"{child['ttft_seconds']:.4g}", f"{parent['ttft_seconds']:.4g}"),
        ("time per output token, s", f"{child['tpot_seconds']:.4g}", f"{parent['tpot_seconds']:.4g}"),
        ("weights and KV cache", bytes_text(child["memory_bytes"]), bytes_text(parent["memory_bytes"])),
        ("KV bytes per token", child["kv_bytes_per_token"], parent["kv_bytes_per_token"]),
        ("parameters", f"{child['num_parameters']:,}", f"{parent['num_parameters']:,}"),
    ]
    table = "\n".join(f"| {name} | {ours} | {theirs} |" for name, ours, theirs in rows)
    drawing = "\n".join(picture(solved["layers"], library))
    return (
        "\n".join(front)
        + f"""
# A child of {facts["parent"]["name"]}

Made by [puzzle](https://pypi.org/project/puzzle-nas/) {__version__} for the goal `{json.dumps(goal)}` at
{work["input_len"]} input and {work["output_len"]} output tokens.

```
{drawing}
```

| predicted on {solved["costs"]["device"]}, {solved["costs"]["dtype"]} | child | parent |
|---|---|---|
{table}

The sum of the replaced blocks' own KL divergences, measured one at a time, is {solved["objective"]:.4f} nats per token
(solver: {solved["status"]}, gap {solved["gap"]:.1e}, {solved["solver"]}). The whole child's KL is what
`puzzle evaluate` measures.

Recipe: block-local distillation on {recipe["num_steps"] * recipe["batch_size"] * recipe["seq_len"]:,} tokens in sequences
of {recipe["seq_len"]}, learning rate {recipe["lr"]:g}, data hash `{facts["data"]["hash"][:16]}`, parent fingerprint
`{facts["parent"]["fingerprint"][:16]}`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
```
"""
    )
