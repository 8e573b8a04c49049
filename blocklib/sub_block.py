"""A sub-block as a value: its sizes, and all that can be said of it (its faces). Needs no torch.

    gqa h4096 q32 kv8 d128 window1024         softmax attention: hidden size, query heads, KV heads, head_dim, window
    swiglu h4096 f14336                       gated FFN of 14336 channels
    moe h2048 e128 k8 f768                    mixture of 128 experts of 768 channels, of which a token has 8
    relu2 h4480 f15680                        FFN without a gate, of squared ReLUs
    mamba2 h4480 heads128 d80 groups8 state128    Mamba-2: hidden size, heads, head_dim, groups, state size
    gated_delta h4096 kheads16 k128 vheads32 v128    Gated DeltaNet: key heads and their size, value heads and theirs
    linear h4096                              one matrix; rank256: the product of two, [H, 256] and [256, H]
    none                                      nothing, not even a norm

A line like these is a sub-block's key, the one text form: cost tables, library.json, architecture.json. Each kind is a
file of its own in this folder, or a module under the entry-point group `puzzle.blocks`; its module in plain PyTorch has the
same name in `plain/`, the one on our kernels in `fast/`, the one in vLLM's layers in `vllm/`. A face that a kind lacks raises `MissingFace`; nothing guesses.

Letters: H hidden_size, B sequences, T tokens.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from puzzle.base.errors import UserError, nearest
from puzzle.base.units import FIXED_BYTES, PRECISION_BYTES
from puzzle.blocklib.moments import Moments, Statistics
from puzzle.blocklib.words import WANTED, fits, read_word, types_of, wanted, word_of

if TYPE_CHECKING:
    from torch import Tensor

OURS = ("gqa", "swiglu", "relu2", "moe", "mamba2", "gated_delta", "linear", "none")  # in the order of their offers
DEFAULT_EPS = 1e-6
TPS = (1, 2, 4, 8)  # ranks of tensor parallel


class MissingFace(UserError):
    """A kind of sub-block was asked for something that it cannot do."""

    def __init__(self, kind: str, face: str):
        super().__init__(f"sub-blocks of kind '{kind}' have no {face}: use another kind, or add it in blocklib/")


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What one sequence keeps between tokens: elements per token, of the last `reach` tokens (None: of all), in the cache's precision;
    elements whatever its length, in that of activations; and bytes whatever its length, of what has a dtype of its own."""

    per_token: int = 0
    reach: int | None = None
    per_sequence: int = 0
    own_bytes: int = 0

    def num_bytes(self, num_tokens: int, cache: str, page: int = 1) -> int:
        """Of one sequence of `num_tokens`, in a cache of pages of `page` tokens in the precision `cache`."""
        return self.bytes_of(self.kept(num_tokens, page), cache)

    def bytes_of(self, num_kept: int, cache: str) -> int:
        """Of one sequence of which `num_kept` tokens are kept."""
        return PRECISION_BYTES[cache] * self.per_token * num_kept + self.fixed_bytes(cache)

    def fixed_bytes(self, cache: str) -> int:
        """Of one sequence, whatever its length."""
        return FIXED_BYTES[cache] * self.per_sequence + self.own_bytes

    def kept(self, num_tokens: int, page: int = 1) -> int:
        """Tokens of `num_tokens` that are kept, in whole pages; a window that moves on touches one page more than it fills."""
        pages = -(-num_tokens // page)
        if self.reach is not None:
            pages = min(pages, -(-self.reach // page) + (page > 1))
        return pages * page

    def __bool__(self) -> bool:
        return self.per_token > 0 or self.per_sequence > 0 or self.own_bytes > 0


@dataclass(kw_only=True, slots=True)
class ParentBlock:
    """One sub-block of a parent: weights by their name inside it ("norm.weight", "q_proj.weight", ...).

    moments(): computed when they are asked for, once.
    """

    sub_block: SubBlock
    weights: dict[str, Tensor]
    statistics: Statistics | None = None
    moments: Callable[[], Moments] | None = None

    def calibrated(self, what: str) -> Statistics:
        """The statistics, which `what` needs."""
        if self.statistics is None:
            raise ValueError(f"{what} needs calibration statistics")
        return self.statistics

    def measured(self, what: str) -> Moments:
        """The moments, which `what` needs."""
        if self.moments is None:
            raise ValueError(f"{what} needs calibration inputs")
        return self.moments()


Initialise = Callable[[ParentBlock], "dict[str, Tensor]"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """What may stand in for a parent's sub-block: its short name ("kv2", "0.5"), what it is, and how it starts.

    initialise: from the parent's block to the tensors that `sub_block.tensors()` lists, in float32. edition: of `initialise`, raised
    where it begins otherwise than before, so that a library's blocks of an earlier one are made anew.
    """

    name: str
    sub_block: SubBlock
    initialise: Initialise
    edition: int = 0


def size(key: str, *, config: str | None = None, default: Any = MISSING, choices: tuple[str, ...] = ()) -> Any:
    """A field of a sub-block: int (above 0), float, bool or str, or one of these and None. key: its name in the text form; config:
    its name in `per_layer_config`, if layers of one model may differ in it; choices: all texts that it may be, if not any."""
    metadata = {"key": key, "config": config, "choices": choices}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True, slots=True)
class SubBlock:
    """The base of all kinds. kind: the first word of its key. plain, in_training, on_kernels, on_vllm: "module:class" of its
    module in plain PyTorch (a `plain.part.Part`), of that with fewer passes in training (None: the plain one), on our kernels (a
    `fast.batch.Fast`) and in vLLM's layers (`vllm/place.py`), imported when they are wanted; None: it has none. read_input: its matrices that
    multiply with what enters, which nothing else in it reads. exact: tensors that keep their own dtype, whatever the model's.
    routes: it chooses, token by token, which of its weights are used, so that a rounding can choose others. num_sums, added_once: of tensor
    parallel, see `share`."""

    kind: ClassVar[str]
    plain: ClassVar[str | None] = None
    in_training: ClassVar[str | None] = None
    on_kernels: ClassVar[str | None] = None
    on_vllm: ClassVar[str | None] = None
    read_input: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[tuple[str, ...]] = ()
    routes: ClassVar[bool] = False
    num_sums: ClassVar[int] = 1  # all-reduces of [tokens, H] that end its share
    added_once: ClassVar[tuple[str, ...]] = ()  # tensors that count once in the sum over all shares

    def __post_init__(self) -> None:
        """Raises UserError for a value that its field cannot have: whatever made it, a misspelt one would mean something else."""
        for f in fields(self):
            value = getattr(self, f.name)
            if not fits(f, value):
                raise UserError(f"sub-block of kind '{self.kind}': {f.name} {value!r} is not {wanted(f)}")

    # -- faces that every kind has ---------------------------------------------------------------------------

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of its module."""
        raise MissingFace(self.kind, "tensors")

    def state(self) -> State:
        """What a sequence keeps between tokens. A kind that keeps nothing says so."""
        raise MissingFace(self.kind, "state")

    def symbol(self, parent: SubBlock) -> str:
        """One character that shows this sub-block in place of `parent`."""
        raise MissingFace(self.kind, "symbol")

    def words(self, parent: SubBlock) -> str:
        """What people read of it where `parent` stood."""
        return self.key()

    def module(self, in_training: bool = False) -> Any:
        """In plain PyTorch, on the device where modules are made now, with weights yet to be loaded (`plain.part.Part`)."""
        path = self.in_training if in_training and self.in_training else self.plain
        return _imported(path, self.kind, "plain module")(self)

    def fast(self, part: Any, batch: Any) -> Any:
        """The plain module `part` on our kernels, in this batch (`fast.batch.Fast`), its state made; None: nothing to run."""
        return _imported(self.on_kernels, self.kind, "path on our kernels")(part, batch)

    def in_vllm(self, place: Any) -> Any:
        """What stands between its norms, in vLLM's layers at this place (`vllm.place.Place`); None: nothing to run."""
        return _imported(None if self.lacks_in_vllm else self.on_vllm, self.kind, str(self.lacks_in_vllm))(self, place)

    @classmethod
    def stand_ins(cls, parent: SubBlock) -> list[str]:
        """Names of what this kind offers by default in place of `parent`; [] where it has nothing to offer."""
        return []

    @classmethod
    def stand_in(cls, parent: SubBlock, name: str) -> Variant | None:
        """The variant that `name` means in place of `parent`; None when the name is another kind's.

        Raises UserError when the name is ours but its value is impossible.
        """
        return None

    def linear_map(self, block: ParentBlock) -> Tensor:
        """The H × H matrix that a linear sub-block starts from in place of this one. float32"""
        raise MissingFace(self.kind, "linear map to start from")

    def mixing_flops(self, context: float) -> float:
        """Beside its matrix products: FLOPs per token over `context` tokens of state."""
        return 0.0

    def share(self, tp: int) -> SubBlock:
        """What each of `tp` ranks runs of it: their contributions, before a norm after, add up to its own.

        Raises UserError where it cannot be shared by so many.
        """
        raise MissingFace(self.kind, "share of tensor parallel")

    def begins(self, wider: SubBlock) -> bool:
        """Whether this is `wider` with its first channels alone, so that both can share weights (`plain.part.Part.prefixes`)."""
        return False

    # -- what follows from them ------------------------------------------------------------------------------

    @property
    def lacks_in_vllm(self) -> str | None:
        """The face that vLLM does not have for it; None where it runs there. Needs no vLLM."""
        return "face in vLLM" if self.on_vllm is None and type(self).in_vllm is SubBlock.in_vllm else None

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors, norms included."""
        return sum(math.prod(shape) for shape in self.tensors().values())

    @property
    def num_matrix_parameters(self) -> int:
        """Elements of its matrices, stacked biases not among them: what a token is multiplied by."""
        return sum(math.prod(s) for name, s in self.tensors().items() if len(s) > 1 and not name.endswith("bias"))

    @property
    def widest(self) -> int:
        """The longest side of a matrix: of as many elements a token are the largest tensors that a backward pass needs."""
        return max((side for shape in self.tensors().values() if len(shape) > 1 for side in shape), default=0)

    def saved(self, context: int) -> int:
        """Elements a token, of sequences of `context`, that the plain forward pass keeps for the backward pass, norms apart: at most."""
        return 4 * self.widest

    def active_parameters(self) -> int:
        """Parameters that one token uses."""
        return self.num_parameters

    def flops(self, rows: int, context: float) -> float:
        """Of a forward pass of `rows` tokens over `context` tokens of state each."""
        return rows * (2 * self.num_matrix_parameters + self.mixing_flops(context))

    def training_flops(self, context: float) -> float:
        """Per token that it is trained on, at `context` tokens of state: a forward pass, the gradients of its weights, and those of what
        they multiply, but for the input, whose gradient nobody needs. Nothing counts that is computed twice."""
        first = sum(math.prod(shape) for name, shape in self.tensors().items() if name in self.read_input)
        return 3 * self.flops(1, context) - 2 * first

    @property
    def by_rows(self) -> bool:
        """True where the time depends on the number of tokens alone, however they are spread over sequences."""
        return not self.state()

    def timed(self) -> Self:
        """The sub-block as a clock sees it: what changes no time has its default value."""
        return self

    def shared(self, tp: int) -> SubBlock:
        """`share`, but for one rank, which any kind has whole."""
        return self if tp == 1 else _share(self, tp)

    def can_share(self, tp: int) -> bool:
        """Whether so many ranks can share it."""
        try:
            self.shared(tp)
        except UserError:
            return False
        return True

    def cut(self, weights: Mapping[str, Tensor], rank: int, tp: int) -> dict[str, Tensor]:
        """The weights of this rank's share. A dimension that is shorter there is cut into as many parts as it takes; where these are
        fewer than ranks, as KV heads may be, neighbours have the same one."""
        found = {}
        for name, size in self.shared(tp).tensors().items():
            tensor = weights[name]
            for dim, length in enumerate(size):
                parts = tensor.shape[dim] // length
                tensor = tensor.narrow(dim, rank * parts // tp * length, length)
            found[name] = tensor.new_zeros(size) if rank and name in self.added_once else tensor
        return found

    def replacements(self) -> list[Variant]:
        """What may stand in for it by default."""
        names = [(kind, name) for kind in kinds().values() for name in kind.stand_ins(self)]
        return [variant for kind, name in names if (variant := kind.stand_in(self, name)) is not None]

    # -- the text form ---------------------------------------------------------------------------------------

    def key(self) -> str:
        """The text that `parse_key` reads back as an equal sub-block."""
        norms = {f.name for f in fields(Normed)}
        found = sorted(
            fields(self), key=lambda f: (f.default is not MISSING, f.default is not MISSING and f.name in norms)
        )
        told = [(f, getattr(self, f.name)) for f in found]
        words = [word_of(f.metadata["key"], v) for f, v in told if f.default is MISSING or v != f.default]
        return " ".join([self.kind, *words])

    # -- one entry of a child's `per_layer_config` -----------------------------------------------------------

    def to_config(self, base: SubBlock) -> dict[str, Any]:
        """What config.json says of this sub-block beside `base`, the one that the config's global values describe.

        Raises MissingFace for a difference that `per_layer_config` has no word for.
        """
        if type(base) is not type(self):
            raise MissingFace(self.kind, f"entry in per_layer_config where other layers have '{base.kind}'")
        entry = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if value != getattr(base, f.name):
                if f.metadata["config"] is None:
                    raise MissingFace(self.kind, f"{f.name} of its own in per_layer_config")
                entry[f.metadata["config"]] = value
        return entry

    @classmethod
    def config_words(cls) -> dict[str, str]:
        """{word in `per_layer_config`: field} of this kind."""
        return {f.metadata["config"]: f.name for f in fields(cls) if f.metadata["config"] is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Normed(SubBlock):
    """A sub-block with RMS norms, which it owns: x + residual_scale · post_norm(inner(norm(x))).

    norm: "before" (`norm.weight`, as Llama), "after" (`post_norm.weight`, as OLMo-2) or "both" (Gemma-3).
    norm_offset: the scale of a norm is 1 + its weight (Gemma).
    """

    hidden_size: int = size("h")
    norm: str = size("norm", default="before", choices=("before", "after", "both"))
    norm_eps: float = size("eps", default=DEFAULT_EPS)
    norm_offset: bool = size("norm_offset", default=False)
    residual_scale: float = size("residual", default=1.0)

    @property
    def norm_before(self) -> bool:
        return self.norm in ("before", "both")

    @property
    def norm_after(self) -> bool:
        return self.norm in ("after", "both")

    def inner_tensors(self) -> dict[str, tuple[int, ...]]:
        """Those between the norms."""
        raise MissingFace(self.kind, "tensors")

    def tensors(self) -> dict[str, tuple[int, ...]]:
        before = {"norm.weight": (self.hidden_size,)} if self.norm_before else {}
        after = {"post_norm.weight": (self.hidden_size,)} if self.norm_after else {}
        return before | self.inner_tensors() | after

    def timed(self) -> Self:
        return replace(self, norm_eps=DEFAULT_EPS, norm_offset=False)

    def linear_map(self, block: ParentBlock) -> Tensor:
        """That with the least squared error of what stands between the norms, on calibration tokens."""
        from puzzle.blocklib.initialize import least_squares

        return least_squares(block.measured(f"a linear map in place of {self.kind}"))

    def norm_fields(self) -> dict[str, Any]:
        """The fields of this class, for another sub-block that takes this one's place."""
        return {f.name: getattr(self, f.name) for f in fields(Normed)}


def check_tp(tp: int) -> None:
    """Raises UserError for a number of ranks that are not the GPUs of one host."""
    if tp not in TPS:
        raise UserError(f"`tp` {tp}: the GPUs of one host that share a model are {', '.join(map(str, TPS))}")


@cache
def _share(sub_block: SubBlock, tp: int) -> SubBlock:
    return sub_block.share(tp)


def divided(count: int, tp: int, what: str) -> int:
    """One rank's part of `count`. Raises UserError where that is no whole number."""
    if count % tp:
        raise UserError(f"`tp` {tp}: {what} {count} does not divide by it: use fewer ranks, or leave such variants out")
    return count // tp


def _imported(path: str | None, kind: str, face: str) -> Any:
    if path is None:
        raise MissingFace(kind, face)
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


# -- registry ------------------------------------------------------------------------------------------------

Kind = TypeVar("Kind", bound=type[SubBlock])
_KINDS: dict[str, type[SubBlock]] = {}


def register(cls: Kind) -> Kind:
    """Class decorator: a kind of sub-block. Raises ValueError for a name that another kind has, or a field without a text form."""
    known = _KINDS.get(cls.kind, cls)
    if known.__qualname__ != cls.__qualname__ or known.__module__ != cls.__module__:
        raise ValueError(f"two kinds of sub-block are called '{cls.kind}': {known} and {cls}")
    keys = [f.metadata.get("key", "") for f in fields(cls)]
    for f, key in zip(fields(cls), keys, strict=True):
        if not re.fullmatch("[a-z_]+", key) or keys.count(key) > 1 or not set(types_of(f)) <= set(WANTED):
            raise ValueError(
                f"field {f.name} of kind '{cls.kind}' has no text form: make it a `size(...)` with a word of its own in small "
                f"letters, of type int, float, bool or str, or one of these and None"
            )
    return _KINDS.setdefault(cls.kind, cls)  # type: ignore[return-value]


@cache
def kinds() -> dict[str, type[SubBlock]]:
    """All kinds by name: ours first, then those of installed entry points `puzzle.blocks`."""
    from importlib.metadata import entry_points  # takes 15 ms, which --help should not

    for name in OURS:
        importlib.import_module(f"puzzle.blocklib.{name}")
    for entry in entry_points(group="puzzle.blocks"):
        entry.load()
    places = {f"puzzle.blocklib.{name}": place for place, name in enumerate(OURS)}  # whoever imported which first
    for name in sorted(_KINDS, key=lambda name: places.get(_KINDS[name].__module__, len(places))):
        _KINDS[name] = _KINDS.pop(name)
    return _KINDS


def parse_key(text: str) -> SubBlock:
    """The sub-block that `key` wrote. Raises UserError for an unknown kind, or a word or a value that the kind does not know."""
    kind, *words = text.split() or [""]
    if kind not in kinds():
        raise UserError(f"sub-block '{text}': kind '{kind}' is unknown ({nearest(kind, kinds())})")
    cls = kinds()[kind]
    known: dict[str, Field] = {f.metadata["key"]: f for f in fields(cls)}
    values: dict[str, Any] = {}
    for word in words:
        name, value = read_word(word)
        if name not in known:
            raise UserError(f"sub-block '{text}': '{word}' is no word of kind '{kind}' ({nearest(name, known)})")
        if not fits(known[name], value):
            raise UserError(f"sub-block '{text}': '{word}' gives {name} a value that is not {wanted(known[name])}")
        if known[name].name in values:
            raise UserError(f"sub-block '{text}': '{name}' is given twice")
        values[known[name].name] = value
    if missing := [k for k, f in known.items() if f.default is MISSING and f.name not in values]:
        raise UserError(f"sub-block '{text}' lacks {', '.join(missing)}: '{kind}' is not whole without")
    return cls(**values)
