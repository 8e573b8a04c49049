"""What `puzzle slice` does with its options: a parent with one hidden width, depth and size of Mamba-2, as a parent of its own."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from puzzle.base.device import compute_dtype, pick_device
from puzzle.base.errors import UserError
from puzzle.base.files import SCHEMA, claim_output
from puzzle.base.units import check_positive, parse_bytes
from puzzle.blocklib.mamba2 import Mamba2
from puzzle.blocklib.moe import Moe
from puzzle.data.packing import load_tokens
from puzzle.export.checkpoint import write_checkpoint
from puzzle.export.sources import licence_of
from puzzle.measure.evaluate import Evaluated, EvaluateOptions, evaluate
from puzzle.measure.measurable import Measurable
from puzzle.parents.names import FINAL_NORM
from puzzle.parents.opened import HfModel, open_model
from puzzle.parents.point import FILE, Point
from puzzle.parents.structure import Structure
from puzzle.slice.config import check_sliceable, sliced_config
from puzzle.slice.model import Axes, SlicedParent
from puzzle.slice.statistics import gather

STEP = 8  # hidden channels: rows of grouped products begin at multiples of 16 bytes, in bf16


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceOptions:
    """hidden: width of the residual stream; depth: whole layers; mamba_heads, mamba_head_dim: of every Mamba-2; None: as they are.
    calibration_sequences order them, score_sequences, held out, measure the result, of seq_len tokens each."""

    data: tuple[str, ...]
    out: Path
    hidden: int | None = None
    depth: int | None = None
    mamba_heads: int | None = None
    mamba_head_dim: int | None = None
    calibration_sequences: int = 64
    score_sequences: int = 64
    seq_len: int = 1024
    memory_limit: int | None = None
    max_shard: str = "4GiB"
    force: bool = False
    dry_run: bool = False
    text_field: str = "text"
    device: str = "auto"

    def check(self) -> None:
        """Raise UserError for values that no parent could be sliced to."""
        check_positive(self, "hidden", "depth", "mamba_heads", "mamba_head_dim")
        check_positive(self, "calibration_sequences", "seq_len", "memory_limit")
        if self.score_sequences < 2:
            raise UserError(f"`score_sequences` {self.score_sequences}: an error of the mean takes 2 at least")
        if all(value is None for value in (self.hidden, self.depth, self.mamba_heads, self.mamba_head_dim)):
            raise UserError("nothing to slice: pass `hidden`, `depth`, `mamba_heads` or `mamba_head_dim`")

    def axes(self, parent: HfModel) -> Axes:
        """Raises UserError for what is no smaller part of this parent."""
        whole, heads, dim = parent.structure, self.mamba_heads, self.mamba_head_dim
        for name, most, what in (
            ("hidden", whole.hidden_size, "hidden channels"),
            ("depth", whole.num_layers, "layers"),
        ):
            if (getattr(self, name) or 0) > most:
                raise UserError(f"`{name}` {getattr(self, name)}: {parent.source} has {most} {what}: give 1 to {most}")
        if (
            self.hidden
            and self.hidden % STEP
            and any(isinstance(b, Moe) for _, _, b in whole)
            and self.hidden < whole.hidden_size
        ):
            raise UserError(f"`hidden` {self.hidden}: products of experts want a multiple of {STEP} hidden channels")
        if heads is None and dim is None:
            return Axes(hidden=self.hidden, depth=self.depth)
        first = next((b for _, _, b in whole if isinstance(b, Mamba2)), None)
        if first is None:
            given = "mamba_head_dim" if heads is None else "mamba_heads"
            raise UserError(f"`{given}` {getattr(self, given)}: {parent.source} has no Mamba-2: leave it out")
        axes = Axes(
            hidden=self.hidden, depth=self.depth, mamba=f"heads{heads or first.num_heads}-dim{dim or first.head_dim}"
        )
        axes.structure(whole, list(range(whole.num_layers)))  # refuses heads that groups do not share
        return axes


def slice_verb(source: str, wanted: SliceOptions) -> dict[str, Any]:
    """{"parent", "out", "point", "layers", "dropped", "num_parameters", "num_bytes"} and, unless it is a dry run, "measured", the
    sliced parent against the whole one on held-out text before any training.

    Writes a checkpoint of the parent's own family with slice.json beside it. Raises UserError before anything is measured for what the
    parent cannot be, and leaves nothing half-written.
    """
    wanted.check()
    measuring = EvaluateOptions(
        sequences=wanted.score_sequences,
        seq_len=wanted.seq_len,
        memory_limit=wanted.memory_limit,
        text_field=wanted.text_field,
        device=wanted.device,
    )
    max_shard, device = parse_bytes(wanted.max_shard, "max_shard"), pick_device(wanted.device)
    parent = open_model(source)
    check_sliceable(parent)
    axes, whole = wanted.axes(parent), parent.structure
    if wanted.seq_len > whole.max_length:
        raise UserError(
            f"`seq_len` {wanted.seq_len}: {source} has a context of {whole.max_length} tokens: use at most so many"
        )
    first = list(range(axes.depth or whole.num_layers))
    sliced_config(parent, axes.structure(whole, first), first)  # refuses here what it would of any layers
    if not wanted.dry_run:
        claim_output(wanted.out, wanted.force, [source, *wanted.data])
    if not wanted.data:
        raise UserError("`data` is missing: channels and layers are ordered by what they do on text")
    size = parent.checkpoint.dtype(FINAL_NORM).itemsize
    if wanted.dry_run:
        return _facts(parent, axes.structure(whole, first), size, wanted) | {"dry_run": True}
    tokens = load_tokens(
        list(wanted.data),
        parent.directory,
        seq_len=wanted.seq_len,
        num_train=wanted.calibration_sequences,
        num_validation=wanted.score_sequences,
        text_field=wanted.text_field,
    )
    tokens.check_error_of_mean()
    statistics = gather(parent, tokens.train, device, compute_dtype(device), mixers=axes.mamba is not None)
    sliced = SlicedParent.of(parent, axes, statistics)
    config, structure = sliced_config(parent, sliced.structure, sliced.layers), sliced.structure
    measured = evaluate(
        Measurable(name=source, structure=whole, tokenizer=parent.directory, solved=None, source=parent),
        Measurable(name=str(wanted.out), structure=structure, tokenizer=None, solved=None, source=sliced),
        tokens,
        measuring,
    )
    measured.child.identity.pop("fingerprint")  # which what is written has of its own
    point = _point(parent, structure, measured.child)
    record = {
        "schema": SCHEMA,
        "point": asdict(point),
        "layers": sliced.layers,
        "channels": sliced.channels.tolist(),
        "influence": statistics.influence,
        "data_hash": tokens.hash,
        "measured": measured.to_json(),
    }
    generation = "generation_config.json"
    write_checkpoint(
        wanted.out,
        config=config,
        tensors=sliced.tensors(),
        tokenizer_from=parent.directory,
        generation_config=parent.checkpoint.read(generation) if (parent.directory / generation).is_file() else None,
        card=_card(point, licence_of(parent.directory)),
        extra_json={FILE: record},
        code=(),
        max_shard_bytes=max_shard,
        force=wanted.force,
    )
    dropped = sorted(set(range(whole.num_layers)) - set(sliced.layers))
    told = {"dry_run": False, "point": asdict(point), "layers": sliced.layers, "dropped": dropped}
    return _facts(parent, structure, size, wanted) | told | {"measured": measured.to_json()}


def _facts(parent: HfModel, structure: Structure, size: int, wanted: SliceOptions) -> dict[str, Any]:
    whole = parent.structure
    return {
        "parent": parent.source,
        "out": str(wanted.out),
        "hidden_size": [whole.hidden_size, structure.hidden_size],
        "num_layers": [whole.num_layers, structure.num_layers],
        "num_parameters": [whole.num_parameters, structure.num_parameters],
        "num_bytes": [whole.num_parameters * size, structure.num_parameters * size],
        "calibration_tokens": wanted.calibration_sequences * wanted.seq_len,
        "held_out_tokens": wanted.score_sequences * wanted.seq_len,
    }


def _point(parent: HfModel, structure: Structure, measured: Evaluated) -> Point:
    mixers = [b for _, _, b in structure if isinstance(b, Mamba2)]
    assert measured.kl is not None
    assert measured.kl_stderr is not None
    return Point(
        name=Path(parent.source).absolute().name,
        fingerprint=parent.checkpoint.fingerprint(),
        hidden_size=structure.hidden_size,
        num_layers=structure.num_layers,
        mamba=f"{mixers[0].num_heads}x{mixers[0].head_dim}" if mixers else None,
        kl=measured.kl,
        kl_stderr=measured.kl_stderr,
    )


def _card(point: Point, licence: str | None) -> str:
    front = f"---\nlicense: {licence}\n---\n\n" if licence else ""
    return (
        f"{front}# {point.name}, sliced: {point.told}\n\nMade by `puzzle slice`, not trained since. On held-out text its next tokens are "
        f"{point.kl:.4g} ± {point.kl_stderr:.2g} nats (KL, measured) from those of {point.name}. slice.json has the layers and hidden "
        "channels that are left.\n"
    )
