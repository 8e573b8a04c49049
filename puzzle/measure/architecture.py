"""architecture.json: the choice per layer and slot, and what was promised for it. Needs no torch.

{"schema": 2, "layers": [{"attention": {"variant": "kv2", "sub_block": "gqa h4096 …", "precision": "bf16"}, "ffn": {…}}, …],
 "parent": the parent's structure, "predicted": {…}, "parent_predicted": {…}, "speedup": 2.01, …}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from puzzle.base.errors import UserError, writing
from puzzle.base.files import read_any, read_json, write_json
from puzzle.base.units import FIXED_BYTES, PRECISION_BYTES
from puzzle.base.workload import Workload
from puzzle.blocklib.none import NO_OP, NoOp
from puzzle.blocklib.sub_block import SubBlock, parse_key
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.parents.structure import Layer, Structure

MADE_BY = "puzzle solve"
SCHEMA = 2
FINALISTS = (
    "finalists.csv",
    "finalists.json",
)  # of all children that were measured, beside the best one's architecture


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What stands in one layer and slot: its name in the library, what it is, and the precision of its weights."""

    variant: str
    sub_block: SubBlock
    precision: str

    def to_json(self) -> dict[str, str]:
        return {"variant": self.variant, "sub_block": self.sub_block.key(), "precision": self.precision}


Chosen = Mapping[str, Choice]  # one layer: its choices by slot


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What the cost model says of one architecture at one batch size. memory: weights, KV cache at full context, and workspace,
    what the largest sub-block of the library works with; of GPUs that share the model, of each, as kv_bytes_per_token and
    state_bytes: of a sequence, whatever its length (Mamba-2, Gated DeltaNet). latency: prompt to last token; ttft: to the first; tpot: per later one.
    """

    batch: int
    tokens_per_second: float
    latency_seconds: float
    ttft_seconds: float
    tpot_seconds: float
    memory_bytes: int
    workspace_bytes: int
    kv_bytes_per_token: int
    num_parameters: int
    state_bytes: int = 0
    active_parameters: int | None = None  # that a token uses; None as earlier versions wrote it


@dataclass(frozen=True, kw_only=True, slots=True)
class Also:
    """What was promised for a further workload."""

    workload: Workload
    goal: Mapping[str, Any]
    predicted: Prediction
    parent_predicted: Prediction
    speedup: float
    extrapolated: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """goal: limits as they were asked for, by the names of `puzzle.choose.goal.LIMITS`. costs: {"device", "precision", "sha256"} of
    the prices, of an engine's also {"format", "room_bytes", "left_out"} (`EngineModel`). status, objective (the sum of scores), bound, gap, slack, seconds, solver: as `solver.Solution` has them.
    kv_dtype: what is cached, where precision was chosen; None: as the costs' precision, which the parent's figures are in.
    bound, gap: None of a baseline, which proves nothing. speedup: each at its best batch. extrapolated: prices beyond measured points, a line each. fuse: runs (first, last) of layers
    that were priced as one, and fusion how; None without --fusion. fused: runs of these layers that `puzzle fuse` has made one
    since. measured: {"kl", "kl_stderr", "num_tokens"} of the child on held-out text, where it was chosen by that. objective_per_batch:
    {batch: sum of scores}. host_pace: where a serving engine's own Python sets the child's pace (`CostModel.host_pace`); None: nowhere.
    tp: GPUs that share every sub-block; costs then have {"all_reduce"} too. prices: what looser limits would buy, where it was asked for.
    point: where the parent of these layers was itself sliced (`parents.point.Point`); objective and bound then begin with its kl, and
    whole is the structure of the parent that it was sliced from. points: what came out at each global point."""

    parent_fingerprint: str
    parent: Structure
    layers: tuple[Chosen, ...]
    goal: Mapping[str, Any]
    workload: Workload
    costs: Mapping[str, Any]
    status: str
    objective: float
    bound: float | None
    gap: float | None
    slack: Mapping[str, float]
    seconds: float
    solver: str
    predicted: Prediction
    parent_predicted: Prediction
    speedup: float
    speedup_at_same_batch: float
    extrapolated: tuple[str, ...] = ()
    also: tuple[Also, ...] = ()
    fuse: tuple[tuple[int, int], ...] | None = None
    fused: tuple[tuple[int, int], ...] = ()
    fusion: Mapping[str, Any] | None = None
    objective_per_batch: Mapping[str, float] | None = None
    prices: tuple[Mapping[str, Any], ...] | None = None
    kv_dtype: str | None = None
    tp: int = 1
    host_pace: Mapping[str, float] | None = None
    measured: Mapping[str, float] | None = None
    synthetic_scores: bool = False
    point: Mapping[str, Any] | None = None
    whole: Structure | None = None
    points: tuple[Mapping[str, Any], ...] | None = None
    puzzle: str = ""

    @property
    def reference(self) -> Structure:
        """The parent that `parent_predicted` and every relative figure are of."""
        return self.whole or self.parent

    @property
    def best_point(self) -> Mapping[str, Any] | None:
        """Of `points`, the one that this is of."""
        found = [one for one in self.points or () if one["objective"] is not None]
        return min(found, key=lambda one: one["objective"], default=None)

    @property
    def certificate(self) -> str:
        """How far the objective may be from the best one."""
        return (
            "nothing proven"
            if self.bound is None or self.gap is None
            else f"bound {self.bound:.5g}, gap {self.gap:.1e}"
        )

    @property
    def sub_blocks(self) -> list[Layer]:
        """Of every layer, unfused."""
        return [{slot: choice.sub_block for slot, choice in layer.items()} for layer in self.layers]

    @property
    def variants(self) -> list[dict[str, str]]:
        """The names of all choices, per layer and slot."""
        return [{slot: choice.variant for slot, choice in layer.items()} for layer in self.layers]

    @property
    def fp8_weights(self) -> frozenset[tuple[int, str]]:
        """Layer and slot of every sub-block whose weights are in fp8."""
        every = ((index, slot, choice) for index, layer in enumerate(self.layers) for slot, choice in layer.items())
        return frozenset((index, slot) for index, slot, choice in every if choice.precision == "fp8")

    @property
    def precision(self) -> str:
        """What the predictions are for, in words."""
        if self.kv_dtype is None:
            return self.costs["precision"]
        count = sum(not isinstance(choice.sub_block, NoOp) for layer in self.layers for choice in layer.values())
        quantised = sum(not isinstance(self.layers[i][slot].sub_block, NoOp) for i, slot in self.fp8_weights)
        return f"parent {self.costs['precision']}; child {quantised} of {count} sub-blocks fp8, cache {self.kv_dtype}"

    def matches(self, layers: Sequence[Layer]) -> bool:
        """Whether a checkpoint has these layers: neither fused nor rewritten for an engine."""
        return [dict(layer) for layer in layers] == self.sub_blocks

    def structure(self) -> Structure:
        """Of the child as it was priced: a run of layers that is to be fused is one layer with the channels of all."""
        layers, begin, found = self.sub_blocks, 0, []
        for first, last in self.fused or self.fuse or ():
            ffns = [ffn for layer in layers[first : last + 1] if isinstance(ffn := layer["ffn"], SwiGLU)]
            wide = replace(ffns[-1], intermediate_size=sum(ffn.intermediate_size for ffn in ffns))
            found += [*layers[begin:first], dict.fromkeys(layers[last], NO_OP) | {"ffn": wide}]
            begin = last + 1
        return self.parent.with_layers([*found, *layers[begin:]])

    def cached_tokens(self, structure: Structure, predicted: Prediction) -> int | None:
        """That a serving engine's cache holds beside the weights of `structure`, in sequences of the workload's length, given the room
        that it had on the card for both; None where that was not measured or no token is kept."""
        room, precision = self.costs.get("room_bytes"), self.costs["precision"]
        own = sum(sub_block.num_parameters for _, _, sub_block in structure)
        weights = PRECISION_BYTES[precision] * own + FIXED_BYTES[precision] * structure.num_fixed_parameters
        cache = predicted.memory_bytes - predicted.workspace_bytes - weights
        if room is None or cache <= 0:
            return None
        tokens = predicted.batch * (self.workload.input_len + self.workload.output_len)
        return max(0, int((room - weights) * tokens / cache))

    def after_fusing(self, runs: Iterable[tuple[int, int]]) -> Architecture:
        """With what `puzzle fuse` has made one. runs: by the numbers of the child's layers before, which earlier ones changed."""
        ends = dict(self.fused)
        firsts = [i for i in range(len(self.layers)) if not any(first < i <= last for first, last in self.fused)]
        done = {firsts[first]: ends.get(firsts[last], firsts[last]) for first, last in runs}
        kept = {a: b for a, b in ends.items() if not any(first <= a <= last for first, last in done.items())}
        return replace(self, fuse=None, fused=tuple(sorted((kept | done).items())))

    def to_json(self) -> dict[str, Any]:
        """What `read_architecture` reads back as an equal architecture."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            "schema": SCHEMA,
            **plain,
            "parent": self.parent.to_json(),
            "whole": None if self.whole is None else self.whole.to_json(),
            "layers": [{slot: choice.to_json() for slot, choice in layer.items()} for layer in self.layers],
            "workload": asdict(self.workload),
            "predicted": asdict(self.predicted),
            "parent_predicted": asdict(self.parent_predicted),
            "also": [asdict(one) for one in self.also],
        }


def architecture_path(path: Path) -> Path:
    """`path` may be the file or the directory it is in."""
    return path / "architecture.json" if path.is_dir() else path


def write_architecture(path: Path, architecture: Architecture) -> None:
    """What was measured beside an architecture.json that was there is removed with it."""
    with writing(path):
        for name in FINALISTS if path.name == "architecture.json" else ():
            path.with_name(name).unlink(missing_ok=True)
    write_json(path, architecture.to_json(), SCHEMA)


def read_architecture(path: Path) -> Architecture:
    """architecture.json, or the one in a directory. Raises UserError when it is missing, broken or not understood."""
    path = architecture_path(path)
    value = read_json(path, MADE_BY, SCHEMA)
    value.pop("schema")
    try:
        return Architecture(**value | _typed(value))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is no architecture ({error}): solve again") from error


def architecture_beside(directory: Path) -> Architecture | None:
    """What the checkpoint in `directory` was solved for; None without it, or where an earlier version wrote it in its own words."""
    path = directory / "architecture.json"
    if not path.is_file() or read_any(path, MADE_BY).get("schema") != SCHEMA:
        return None
    return read_architecture(path)


def _typed(value: Mapping[str, Any]) -> dict[str, Any]:
    def choice(raw: Mapping[str, str]) -> Choice:
        return Choice(variant=raw["variant"], sub_block=parse_key(raw["sub_block"]), precision=raw["precision"])

    def prediction(raw: Mapping[str, Any]) -> Prediction:
        for name, number in raw.items():
            if type(number) not in (int, float) and not (number is None and name == "active_parameters"):
                raise TypeError(f"{name} is {number!r}")
        return Prediction(**raw)

    def promised(raw: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "workload": Workload(**raw["workload"]),
            "predicted": prediction(raw["predicted"]),
            "parent_predicted": prediction(raw["parent_predicted"]),
            "extrapolated": tuple(raw["extrapolated"]),
        }

    if not value["layers"]:
        raise ValueError("it has no layers")
    for name, keys in (("goal", ()), ("costs", ("device", "precision", "sha256"))):
        if not isinstance(value[name], dict) or not value[name].keys() >= set(keys):
            raise TypeError(f"{name}: {value[name]!r}")
    return promised(value) | {
        "parent": Structure.from_json(value["parent"]),
        "whole": Structure.from_json(value["whole"]) if value.get("whole") else None,
        "points": tuple(value["points"]) if value.get("points") else None,
        "layers": tuple({slot: choice(raw) for slot, raw in layer.items()} for layer in value["layers"]),
        "also": tuple(Also(**one | promised(one)) for one in value["also"]),
        "fuse": None if value["fuse"] is None else tuple((first, last) for first, last in value["fuse"]),
        "fused": tuple((first, last) for first, last in value["fused"]),
        "prices": None if value["prices"] is None else tuple(value["prices"]),
    }
