"""What a serving engine takes: a roofline per sub-block and the engine's own overheads, with thirteen fitted constants.

    decode step = max( device step, host + host_sequence·b )
    device step = step + sequence·b + Σ_layers [ (attention | ffn) + matmul(weights, b) + b·(c + tail)·kv_bytes / (kv·BW) ]
    matmul(w, m) = ( (B·w / (weights·BW))⁴ + (2wm / (matmul·FLOPS))⁴ )^¼        w weights of B bytes, m rows
    prefill = the same with m = b·T rows at prefill·FLOPS, causal attention 2·b·T²·N·D / (prefill·FLOPS) in place of the cache, at least
              `launch` for each sub-block, and request·b

b sequences, c cached tokens, T prompt tokens, N query heads, D head_dim; BW and FLOPS from the GPU's datasheet, FLOPS of matrices in
fp8 twice those of bf16. The fourth power rounds the corner of the roofline (Williams et al. 2009): near it neither resource is fully
used. The maximum is an engine that plans the next step while the device computes this one: where its own Python takes longer, it sets
the pace, and no choice of sub-blocks makes a step faster. A prompt's kernels are launched one by one, so that a sub-block takes as
long as that even where the device has little to do. Needs no torch.
The interface is that of `cost_table.CostTable`, so that `solve` prices an engine as it prices our runtime.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from copy import copy
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from puzzle.base.errors import UserError, nearest
from puzzle.base.files import content_hash, parse_json, read_json
from puzzle.base.machine import gpu_facts
from puzzle.base.units import PRECISION_BYTES
from puzzle.base.workload import Workload
from puzzle.blocklib.none import NoOp
from puzzle.blocklib.sub_block import State, SubBlock, parse_key
from puzzle.export.engines import ENGINES as SERVING
from puzzle.export.engines import FORMATS, engine_named
from puzzle.export.lower import lowered
from puzzle.parents.structure import Layer, Structure
from puzzle.profile.parts import Embedding, Ends, Head, Part

ENGINES = Path(__file__).parent / "engines"
BATCHES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)  # measured up to 256 sequences
IN_FLIGHT = 8192  # tokens of a step of vLLM's server on a card of 70 GiB or more (max_num_batched_tokens)
DENSE = ("gqa", "swiglu", "relu2", "linear", "none")  # kinds whose time is that of their matrices, and of a cache
SHARES = ("weights", "kv", "matmul", "prefill")  # constants that are shares of the datasheet's figures


@dataclass(frozen=True, kw_only=True, slots=True)
class Constants:
    """weights, kv: shares of the memory bandwidth that reading them reaches; matmul, prefill: shares of the FLOPS in decode
    and in prefill. step, attention, ffn, sequence: seconds of overhead per step, per sub-block, per sequence and step. tail: cached
    tokens more that a sequence costs, whose last tile the attention kernel never fills. host, host_sequence: seconds of the engine's own
    Python per step, per sequence and step; 0 where no measurement showed it. launch: seconds that a sub-block's kernels of a prompt take
    to be launched. request: per prompt."""

    weights: float = 0.85
    kv: float = 0.8
    matmul: float = 0.6
    prefill: float = 0.6
    step: float = 3e-4
    attention: float = 2.5e-5
    ffn: float = 5e-6
    sequence: float = 2e-6
    tail: float = 0.0
    host: float = 0.0
    host_sequence: float = 0.0
    launch: float = 0.0
    request: float = 0.0


class EngineModel:
    """Seconds of sub-blocks in one engine on one GPU. Every figure that it gives is predicted. parent: the parent's structure and
    what most of its layers have, which say what the engine's export makes of a layer; None: layers stay as they are. largest_batch: that
    was measured. room_bytes: of the card, for weights and caches; None: not measured. left_out: mean relative error of
    tokens/s of architectures that were left out of the fit; None: not known. format: of the export that was measured, whose rewriting counts.
    windows: whether architectures with sliding windows were measured: vLLM keeps a table of cache blocks for every few layers that reach
    as far, for each of which its Python takes its time for every sequence and step.
    """

    def __init__(
        self,
        engine: str,
        gpu: str,
        constants: Constants,
        *,
        device: str = "",
        precision: str = "bf16",
        parent: tuple[Structure, Layer] | None = None,
        largest_batch: int = BATCHES[-1],
        room_bytes: int | None = None,
        format: str = "nemotron-nas",
        left_out: float | None = None,
        windows: bool = False,
    ):
        facts = gpu_facts(gpu)
        self.engine, self.gpu, self.constants = engine, gpu, constants
        self.bandwidth, self.flops = facts.bandwidth, facts.bf16_flops
        self.device = f"{device or gpu}, {engine}"
        self.precision, self.parent = precision, parent
        self.room_bytes, self.format, self.left_out, self.windows = room_bytes, format, left_out, windows
        self.weight_bytes = 1 if precision == "fp8" else 2
        self.batches = [b for b in BATCHES if b < largest_batch] + [largest_batch]
        self.extrapolated: dict[tuple[str, str, int], tuple[int, int, str]] = {}  # a fitted model has no points

    def of(self, structure: Structure) -> EngineModel:
        """The same fit, for another parent."""
        found = copy(self)
        found.parent, found.extrapolated = (structure, structure.usual), {}
        return found

    def served_by(self, engine: str) -> EngineModel:
        """The same fit, for `engine`: its own, of a version."""
        found = copy(self)
        found.engine, found.device, found.extrapolated = engine, f"{self.device.rpartition(', ')[0]}, {engine}", {}
        return found

    @property
    def hash(self) -> str:
        return content_hash({"engine": self.engine, "gpu": self.gpu, **asdict(self.constants)})

    def _matmul(self, weights: float, rows: float, share: float, size: int) -> float:
        """size: bytes of a weight."""
        read = size * weights / (self.constants.weights * self.bandwidth)
        compute = 2 * weights * rows / (share * self.flops * 2 / size)
        return (read**4 + compute**4) ** 0.25

    def seconds(self, part: Part, phase: str, batch: int, context: int) -> float:
        """One prefill of `context` tokens, or one decode step over `context` cached ones, of `batch` sequences.

        Raises UserError for what `unfitted` names.
        """
        if isinstance(part, NoOp | Embedding):
            return 0.0
        own, prompt = self.constants, phase == "prefill"
        rows, share = (batch * context, own.prefill) if prompt else (batch, own.matmul)
        if isinstance(part, Head):
            overhead = own.step + own.sequence * batch + (own.request * batch if prompt else 0.0)
            return overhead + self._matmul(part.hidden_size * part.vocab_size, batch, own.matmul, 2)
        assert isinstance(part, SubBlock)
        num_weights, state, _ = _facts(part)
        self._check_fitted(part)
        seconds = self._matmul(num_weights, rows, share, self.weight_bytes)
        seconds, reach = seconds + (own.attention if state else own.ffn), state.kept(context)
        if prompt:  # half of the scores, by causality
            scores = batch * context * part.mixing_flops(reach) / 2 if state else 0.0
            return larger(own.launch, seconds + scores / (share * self.flops))
        return seconds + self.weight_bytes * state.per_token * batch * (reach + own.tail) / (own.kv * self.bandwidth)

    def unfitted(self, part: SubBlock) -> str | None:
        """What sub-blocks like this one are called, if nobody fitted them: those that keep what no token has (an SSM's state), whose matrices
        no token multiplies one after another (a mixture of experts, however many of them a token takes), or with a window; None where a
        promise holds for it."""
        _, state, apart = _facts(part)
        if apart:
            return f"sub-blocks of kind '{part.kind}'"
        return None if self.windows or state.reach is None else f"sub-blocks of kind '{part.kind}' with a window"

    def _check_fitted(self, part: SubBlock) -> None:
        """Raise UserError for what `unfitted` names."""
        if (what := self.unfitted(part)) is not None:
            raise UserError(f"`engine` {self.engine}: {what} have not been fitted")

    def host_seconds(self, batch: int) -> float:
        """The least that a decode step of `batch` sequences takes, whatever the device has to do."""
        return self.constants.host + self.constants.host_sequence * batch

    def decode_seconds(self, part: Part, batch: int, work: Workload) -> float:
        """All decode steps: the time is linear in the context on either side of a window's reach."""
        steps = work.output_len - 1
        reach = part.state().reach if isinstance(part, SubBlock) else None
        if reach is None:
            return steps * self.seconds(part, "decode", batch, work.input_len + steps // 2)
        return sum(self.seconds(part, "decode", batch, work.input_len + step) for step in range(steps))

    def lowered(self, layer: Layer, first: bool) -> list[SubBlock]:
        """What a layer becomes in this engine's export (`puzzle.export.lower`). first: layer 0.

        Engines without a row in `puzzle.export.engines`, and vLLM's plug-in, get the sub-blocks as they are.
        """
        name, _, version = self.engine.partition("==")
        plug_in = self.format == "hf" and not version  # an export for a version is as its own reader takes it
        if name not in SERVING or self.parent is None or plug_in:
            return list(layer.values())
        structure, base = self.parent
        for part in base.values():
            self._check_fitted(part)
        return lowered(layer, structure, base, self.engine, first=first)

    def kept(self, state: State, num_tokens: int) -> int:
        """Tokens of a sequence that the cache has room for; rounding to pages is in what the memory limit leaves. vLLM sets aside what
        a window may hold while a prompt goes through in pieces (0.26, SlidingWindowSpec.max_admission_blocks_per_request)."""
        return num_tokens if state.reach is None else min(num_tokens, state.reach - 1 + IN_FLIGHT)

    def workspace(self, part: Part, batch: int, input_len: int) -> int:
        """0: an engine takes a share of the card for itself, which the memory limit has to leave."""
        return 0

    def whole_over_parts(self, parent: Structure, phase: str, batch: int, context: int) -> float:
        """1: the overheads are in the parts."""
        return 1.0

    def between_parts(self, parent: Structure, batch: int) -> float:
        """0: likewise."""
        return 0.0


def larger(a: Any, b: Any) -> Any:
    """Of numbers, or element by element where a fit's constants are arrays."""
    if isinstance(a, float | int) and isinstance(b, float | int):
        return max(a, b)
    import numpy as np

    return np.maximum(a, b)


@cache
def _facts(part: SubBlock) -> tuple[int, State, bool]:
    """Elements of its matrices, what it keeps, and whether it is of a kind that no fit knows. A fit asks a million times."""
    state = part.state()
    apart = bool(state.fixed_bytes("bf16")) or part.kind not in DENSE
    return part.num_matrix_parameters, state, apart


def open_engine(
    engine: str,
    gpu: str,
    parent: tuple[Structure, Layer] | None = None,
    *,
    name: str | None = None,
    measured: Path | None = None,
) -> EngineModel:
    """A fit of `engine` on `gpu`: one of the user's own (`measured`/gpu/engine/NAME/fit.json), else a shipped one.

    name: which of several; None: the only one of the user's that is not in fp8, else the shipped one that has no name. Raises UserError
    when there is none, listing those there are, for several of which none was named, and for a version of the engine that is not known; a
    version changes what its export holds, not the constants.
    """
    fitted = engine_named(engine).name if "==" in engine else engine
    own = {} if measured is None else {p.parent.name: p for p in sorted((measured / gpu / fitted).glob("*/fit.json"))}
    unnamed = [p for n, p in own.items() if not n.endswith("-fp8")]
    if name is None and len(unnamed) > 1:
        raise UserError(
            f"several fits of `engine` {engine} on `gpu` {gpu}: {', '.join(own)}; pass `shapes` with one of them"
        )
    stem = "-".join(filter(None, (fitted, gpu, name)))
    shipped = {p.parent.name: p for p in sorted(ENGINES.glob("*/fit.json"))}
    path = unnamed[0] if name is None and unnamed else own.get(name or "", shipped.get(stem))
    if path is not None:
        if (model := read_fit(path, parent)).gpu != gpu or model.engine != fitted:
            raise UserError(f"{path} is a fit of {model.engine} on {model.gpu}, not of {fitted} on {gpu}: fit again")
        return model.served_by(engine)
    names = [*own, *(n.removeprefix(f"{fitted}-{gpu}-") for n in shipped if n.startswith(f"{fitted}-{gpu}-"))]
    if name is not None and names:
        raise UserError(f"`shapes` {name}: the fits of `engine` {engine} on `gpu` {gpu} are {', '.join(names)}")
    raise UserError(
        f"`engine` {engine} on `gpu` {gpu} has not been fitted ({nearest(stem, shipped)}): run `puzzle profile LIBRARY --engine "
        f"{fitted} --gpu {gpu} --run` on that machine, or measure some architectures and pass --fit FILE.csv in its place"
    )


def read_fit(path: Path, parent: tuple[Structure, Layer] | None = None) -> EngineModel:
    """Raises UserError for a file that is no fit."""
    value = read_json(path, "puzzle profile --engine ... --fit")
    try:
        earlier = {f.name: 0.0 for f in fields(Constants) if not f.default}  # which an older fit lacks
        given = earlier | value["constants"]
        constants = Constants(**{f.name: float(given.pop(f.name)) for f in fields(Constants)})
        wrong = [k for k, v in asdict(constants).items() if not 0 <= v < math.inf or (k in SHARES and not v)]
        more = {"device": value["device"], "precision": value["precision"], "parent": parent}
        if "largest_batch" in value:  # earlier ones were measured up to 256
            more |= {name: value[name] for name in ("largest_batch", "room_bytes", "format")}
        error = value.get("leave_one_out", {}).get("throughput", {}).get("mean")
        left_out = None if error is None else float(error)
        more["windows"] = bool(value.get("windows", False))
        if wrong or given:
            raise ValueError(f"constants {', '.join([*wrong, *given])} cannot be")
        _check_facts(more)
        return EngineModel(value["engine"], value["gpu"], constants, left_out=left_out, **more)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is no engine fit ({error}): fit again") from error


def _check_facts(facts: Mapping[str, Any]) -> None:
    """Raise ValueError for what a fit, or what it is made from, cannot say."""
    counts = [facts.get(name) for name in ("largest_batch", "room_bytes")]
    if facts["precision"] not in PRECISION_BYTES or facts.get("format", FORMATS[0]) not in FORMATS:
        raise ValueError(f"precision {facts['precision']!r}, format {facts.get('format')!r}")
    if any(n is not None and (type(n) is not int or n < 1) for n in counts) or not isinstance(facts["device"], str):
        raise ValueError("its device, largest_batch or room_bytes is none")


def read_architectures(path: Path) -> dict:
    """architectures.json beside the measurements: {"gpu", "device", "versions", "precision", "date", "architectures": {name:
    {"sub_blocks": {key: count}, "head": "head h… v…"}}}. Raises UserError when a field is missing or a key is not understood."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
        for name, parts in value["architectures"].items():
            parts_of(parts)
            if not all(type(n) is int and n > 0 for n in parts["sub_blocks"].values()):
                raise ValueError(f"'{name}' has a count that is no positive whole number")
        missing = [k for k in ("gpu", "device", "versions", "precision", "date") if k not in value]
        if not missing:
            _check_facts(value)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): write what was measured there") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} does not describe architectures ({error}): see puzzle/profile/engines for an example"
        ) from error
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: say where the figures come from")
    return value


def parts_of(architecture: dict) -> tuple[tuple[Part, int], ...]:
    """What an entry of architectures.json is made of, each with how often. Raises UserError for a key that is not understood."""
    return _parts(architecture["head"], tuple(architecture["sub_blocks"].items()))


@cache
def _parts(head: str, sub_blocks: tuple[tuple[str, int], ...]) -> tuple[tuple[Part, int], ...]:
    found = re.fullmatch(r"head h(\d+) v(\d+)", head)
    if found is None:
        raise UserError(f"'{head}' is no head: write it as 'head h4096 v128256'")
    last: Ends = Head(hidden_size=int(found[1]), vocab_size=int(found[2]))
    return (*((parse_key(key), count) for key, count in sub_blocks), (last, 1))
