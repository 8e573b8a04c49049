"""What a serving engine takes: a roofline per sub-block and the engine's own overheads, with eight fitted constants.

    decode step = step + sequence·b + Σ_layers [ (attention | ffn) + matmul(weights, b) + b·c·kv_bytes / (kv·BW) ]
    matmul(w, m) = ( (2w / (weights·BW))⁴ + (2wm / (matmul·FLOPS))⁴ )^¼        w weights in bfloat16, m rows
    prefill = the same with m = b·T rows at prefill·FLOPS, plus causal attention 2·b·T²·N·D / (prefill·FLOPS)

b sequences, c cached tokens, T prompt tokens, N query heads, D head_dim; BW and FLOPS from the GPU's datasheet. The fourth
power rounds the corner of the roofline (Williams et al. 2009): near it neither resource is fully used. Needs no torch.
The interface is that of `costs.CostTable`, so that `solve` prices an engine as it prices our runtime.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from puzzle.base.errors import UserError, nearest
from puzzle.base.files import content_hash, read_json
from puzzle.base.machine import gpu_facts
from puzzle.base.workload import Workload
from puzzle.export.engines import ENGINES as SERVING
from puzzle.parents.nemotron_nas import WIDTH_STEP

ENGINES = Path(__file__).parent / "engines"
BATCHES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)  # measured up to 256 sequences


@dataclass(frozen=True, kw_only=True, slots=True)
class Constants:
    """weights, kv: shares of the memory bandwidth that reading them reaches; matmul, prefill: shares of the FLOPS in decode
    and in prefill. step, attention, ffn, sequence: seconds of overhead per step, per sub-block, per sequence and step."""

    weights: float = 0.85
    kv: float = 0.8
    matmul: float = 0.6
    prefill: float = 0.6
    step: float = 3e-4
    attention: float = 2.5e-5
    ffn: float = 5e-6
    sequence: float = 2e-6


class EngineModel:
    """Seconds of sub-blocks in one engine on one GPU. Every figure that it gives is predicted."""

    def __init__(self, engine: str, gpu: str, constants: Constants, *, device: str = "", dtype: str = "bfloat16"):
        facts = gpu_facts(gpu)
        self.engine, self.gpu, self.constants = engine, gpu, constants
        self.bandwidth, self.flops = facts.bandwidth, facts.bf16_flops
        self.device = f"{device or gpu}, {engine}"
        self.dtype = dtype
        self.batches = list(BATCHES)
        self.extrapolated: dict[tuple[str, str, str, int], tuple[int, int, str]] = {}  # a fitted model has no points

    @property
    def hash(self) -> str:
        return content_hash({"engine": self.engine, "gpu": self.gpu, **asdict(self.constants)})

    def _matmul(self, weights: float, rows: float, share: float) -> float:
        read = 2 * weights / (self.constants.weights * self.bandwidth)
        compute = 2 * weights * rows / (share * self.flops)
        return (read**4 + compute**4) ** 0.25

    def seconds(self, kind: str, shape: str, phase: str, batch: int, context: int) -> float:
        """One prefill of `context` tokens, or one decode step over `context` cached ones, of `batch` sequences.

        Raises UserError for a shape that is not of ours.
        """
        if shape == "none" or kind == "embedding":
            return 0.0
        has, own = _sizes(shape), self.constants
        hidden, prompt = has["h"], phase == "prefill"
        rows, share = (batch * context, own.prefill) if prompt else (batch, own.matmul)
        if kind == "head":
            return own.step + own.sequence * batch + self._matmul(hidden * has["v"], batch, own.matmul)
        if "q" not in has:
            weights = 3 * hidden * has["f"] if "f" in has else hidden**2
            return own.ffn + self._matmul(weights, rows, share)
        heads, kv, dim = has["q"], has["kv"], has["d"]
        seconds = own.attention + self._matmul(2 * hidden * dim * (heads + kv), rows, share)
        reach = min(context, has.get("window", context))
        if prompt:
            return seconds + 2 * batch * context * reach * heads * dim / (share * self.flops)
        return seconds + 4 * kv * dim * batch * reach / (own.kv * self.bandwidth)

    def decode_seconds(self, kind: str, shape: str, batch: int, work: Workload) -> float:
        """All decode steps: the time is linear in the context on either side of a window's reach."""
        steps = work.output_len - 1
        reach = _sizes(shape).get("window")
        if reach is None or shape == "none":
            return steps * self.seconds(kind, shape, "decode", batch, work.input_len + steps // 2)
        return sum(self.seconds(kind, shape, "decode", batch, work.input_len + step) for step in range(steps))

    def lowered(self, attention: str, ffn: str, parent_attention: str, *, first: bool) -> list[tuple[str, str]]:
        """(kind, shape) of every part that a layer of these shapes becomes in this engine's export.

        The rewrites of `puzzle.export.lower`, told from shapes alone. first: layer 0, which some engines want to attend;
        an empty layer 0 is dropped, and counts as if the next one took its place without attention. Engines without a row in
        `puzzle.export.engines` get the shapes as they are.
        """
        target = SERVING.get(self.engine)
        if target is None:
            return [("attention", attention), ("ffn", ffn)]
        size = _sizes(parent_attention)
        hidden, is_linear = size["h"], attention.endswith(" linear")
        parts: list[tuple[str, str]] = []
        swiglu = f"h{hidden} linear" if target.linear_ffn else f"h{hidden} f{hidden}"
        if is_linear and not target.linear_attention:  # the linear FFN of a layer put before
            parts.append(("ffn", swiglu))
            is_linear, attention = False, "none"
        if first and "q" not in _sizes(attention):
            if target.first_layer == "softmax attention":
                parts.append(("attention", f"h{hidden} q{size['q']} kv1 d{size['d']}"))
            elif target.first_layer == "linear attention" and not is_linear:
                parts.append(("attention", f"h{hidden} linear"))
        if ffn.endswith(" linear"):
            ffn = swiglu
        elif ffn == "none" and attention != "none" and target.ffn_required:
            ffn = f"h{hidden} f{WIDTH_STEP}"
        return [*parts, ("attention", attention), ("ffn", ffn)]

    def workspace(self, kind: str, shape: str, batch: int, input_len: int) -> int:
        """0: an engine takes a share of the card for itself, which the memory limit has to leave."""
        return 0

    def whole_over_parts(self, parent: list[tuple[str, str]], phase: str, batch: int, context: int) -> float:
        """1: the overheads are in the parts."""
        return 1.0


def _sizes(shape: str) -> dict[str, int]:
    """'h4096 q32 kv8 d128 window1024' -> {"h": 4096, "q": 32, ...}"""
    found = {name: int(value) for name, value in re.findall(r"\b([a-z]+)(\d+)", shape)}
    if shape != "none" and "h" not in found:
        raise UserError(f"sub-block shape '{shape}' is unknown to the engine model: give its hidden size as h4096")
    return found


def sizes_of_part(kind: str, shape: str) -> tuple[int, int]:
    """(parameters, KV elements per token) of a part's matrices; norms and biases are not counted.

    Raises UserError for a shape that is not of ours.
    """
    if shape == "none":
        return 0, 0
    has = _sizes(shape)
    if kind == "attention" and "q" in has:
        return 2 * has["h"] * has["d"] * (has["q"] + has["kv"]), 2 * has["kv"] * has["d"]
    return (3 * has["h"] * has["f"] if "f" in has else has["h"] ** 2), 0


def open_engine(engine: str, gpu: str) -> EngineModel:
    """The shipped fit of `engine` on `gpu`. Raises UserError when there is none, listing those there are."""
    known = sorted(p.parent.name for p in ENGINES.glob("*/fit.json"))
    name = f"{engine}-{gpu}"
    if name not in known:
        raise UserError(
            f"--engine {engine} on --gpu {gpu} has not been fitted ({nearest(name, known)}): measure some architectures "
            f"and run `puzzle profile --engine {engine} --gpu {gpu} --fit FILE.csv`"
        )
    return read_fit(ENGINES / name / "fit.json")


def read_fit(path: Path) -> EngineModel:
    """Raises UserError for a file that is no fit."""
    value = read_json(path, "puzzle profile --engine ... --fit")
    try:
        names = {f.name for f in fields(Constants)}
        constants = Constants(**{k: float(v) for k, v in value["constants"].items() if k in names})
        return EngineModel(value["engine"], value["gpu"], constants, device=value["device"], dtype=value["dtype"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no engine fit ({error}): fit again") from error


def read_architectures(path: Path) -> dict:
    """architectures.json beside the measurements: {"gpu", "device", "versions", "dtype", "date", "architectures": {name:
    {"attention": {shape: count}, "ffn": {shape: count}, "head": shape}}}. Raises UserError when a field is missing."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        for name, parts in value["architectures"].items():
            for shape in [*parts["attention"], *parts["ffn"], parts["head"]]:
                _sizes(shape)
            if not all(isinstance(n, int) and n > 0 for kind in ("attention", "ffn") for n in parts[kind].values()):
                raise UserError(f"{path}: architecture '{name}' has a count that is no positive whole number")
        missing = [k for k in ("gpu", "device", "versions", "dtype", "date") if k not in value]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): write what was measured there") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} does not describe architectures ({error}): see puzzle/engines for an example"
        ) from error
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: say where the figures come from")
    return value
