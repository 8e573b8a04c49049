"""Checkpoints with weights in fp8: which `quantization_config` are understood, and what a stored weight is worth.

    compressed-tensors, float-quantized    NAME_scale [N, 1] per output channel, [1] per tensor, or [N/b, K/c] per block
    fp8 with weight_block_size [b, c]      NAME_scale_inv [N/b, K/c], rounded up (DeepSeek, Qwen3-FP8)

What the scales multiply is float8_e4m3fn; activations, which engines quantise as they come, stay as they are here. A word that is
not understood is refused: it would mean other weights. Letters: N outputs, K inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from puzzle.base.errors import UserError

STORED, SCALES = "F8_E4M3", ("F32", "BF16", "F16")  # dtypes of weights and scales, as safetensors names them
UNDERSTOOD = "compressed-tensors of format float-quantized and quant_method fp8 with weight_block_size are"
NEUTRAL = {  # what changes no weight: of the activations, of the cache, of how it was made
    "compressed-tensors": {"ignore", "kv_cache_scheme", "quantization_status", "global_compression_ratio", "version"},
    "fp8": {"activation_scheme", "modules_to_not_convert", "ignored_layers", "kv_cache_scheme", "scale_fmt"},
    "group": {"targets", "input_activations"},
    "weights": {"observer", "observer_kwargs"},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8:
    """How a checkpoint stores its quantised weights. suffix: of a weight's scales, after its name. ways: "channel", "tensor",
    "block": what the scales may be for; block: (rows, columns)."""

    suffix: str
    ways: frozenset[str]
    block: tuple[int, int] | None = None

    def scale_of(self, name: str) -> str:
        """The name of the scales of a weight."""
        return f"{name}{self.suffix}"

    def scale_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """That the scales of a weight [N, K] may have."""
        rows, columns = shape
        found: list[tuple[int, ...]] = []
        if "channel" in self.ways:
            found += [(rows, 1), (rows,)]
        if "tensor" in self.ways:
            found += [(1,), (), (1, 1)]
        if "block" in self.ways and self.block is not None:
            found += [(-(-rows // self.block[0]), -(-columns // self.block[1]))]
        return found

    def check(self, name: str, entries: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise UserError unless the headers have scales of the right shape and dtype for a weight."""
        scale, shape = self.scale_of(name), tuple(entries[name]["shape"])
        if len(shape) != 2:
            raise UserError(f"weight {name} is stored as {STORED} with shape {list(shape)}: matrices alone are read so")
        if scale not in entries:
            raise UserError(f"weight {name} is stored as {STORED} without its scales {scale}: download it again")
        dtype, found, wanted = entries[scale]["dtype"], tuple(entries[scale]["shape"]), self.scale_shapes(shape)
        if dtype not in SCALES:
            raise UserError(f"scales {scale} are stored as {dtype}, which is not read: {', '.join(SCALES)} are")
        if found not in wanted:
            raise UserError(
                f"scales {scale} have shape {list(found)}, and quantization_config in config.json asks for "
                f"{' or '.join(str(list(one)) for one in wanted)}: they do not belong together"
            )

    def as_table(self, scale: Any, rows: int) -> tuple[Any, tuple[int, int]]:
        """(scales [R, C], block), as `kernels.fp8.from_fp8` takes them. rows: N of the whole weight."""
        if scale.ndim < 2:
            return scale.reshape(-1, 1), (1, 1)
        blocks = self.block is not None and tuple(scale.shape) != (rows, 1)
        return scale, self.block if blocks and self.block is not None else (1, 1)


def fp8_of(config: Mapping[str, Any]) -> Fp8 | None:
    """What config.json says of quantised weights; None where they are not. Raises UserError for what is not understood."""
    name = next((n for n in ("quantization_config", "compression_config") if config.get(n)), None)
    if name is None:
        return None
    said = config[name]
    method = said.get("quant_method") if isinstance(said, Mapping) else None
    if method == "compressed-tensors":
        return _compressed_tensors(_Words(name, said, {*NEUTRAL[method], "quant_method", "format", "config_groups"}))
    if method == "fp8":
        return _block_wise(_Words(name, said, {*NEUTRAL[method], "quant_method", "fmt", "weight_block_size"}))
    raise UserError(
        f"{name} = {said} in config.json asks for quantised weights of a kind that is not read: {UNDERSTOOD}"
    )


class _Words:
    """A section of the config, all of whose words are known: others must say nothing."""

    def __init__(self, where: str, said: Any, known: set[str]):
        self.where, self.said = where, said
        if not isinstance(said, Mapping):
            raise UserError(f"{where} = {said} in config.json is not understood: {UNDERSTOOD}")
        for word in sorted(set(said) - known):
            if said[word]:
                self.refuse(word)

    def refuse(self, word: str) -> None:
        raise UserError(
            f"{self.where}.{word} = {self.said.get(word)} in config.json is a quantisation that is not read: {UNDERSTOOD}"
        )

    def need(self, word: str, *values: Any) -> Any:
        """Its value. Raises UserError for one that is not among `values`, the first of which is the default."""
        found = self.said.get(word, values[0])
        if found not in values:
            self.refuse(word)
        return found


def _compressed_tensors(said: _Words) -> Fp8 | None:
    """None: the cache alone is quantised."""
    ways, blocks = set(), set()
    for name, group in (said.said.get("config_groups") or {}).items():
        where = f"{said.where}.config_groups.{name}"
        own = _Words(where, group, {*NEUTRAL["group"], "weights", "format"})
        own.need("format", None, "float-quantized")
        words = {"num_bits", "type", "symmetric", "strategy", "dynamic", "block_structure"}
        weights = _Words(f"{where}.weights", own.said.get("weights"), NEUTRAL["weights"] | words)
        for word, value in (("num_bits", 8), ("type", "float")):
            if weights.said.get(word) != value:
                weights.refuse(word)
        weights.need("symmetric", True)
        weights.need("dynamic", False)
        ways.add(weights.need("strategy", "tensor", "channel", "block", None) or "tensor")
        if weights.said.get("strategy") == "block":
            blocks.add(_pair(weights, "block_structure"))
        elif weights.said.get("block_structure"):
            weights.refuse("block_structure")
    if not ways:
        if not said.said.get("kv_cache_scheme"):
            said.refuse("config_groups")
        return None
    if said.said.get("format") != "float-quantized":
        said.refuse("format")
    if len(blocks) > 1:
        raise UserError(f"{said.where} in config.json has blocks of several sizes ({sorted(blocks)}): one is read")
    return Fp8(suffix="_scale", ways=frozenset(ways), block=next(iter(blocks), None))


def _block_wise(said: _Words) -> Fp8:
    said.need("fmt", "e4m3", None)
    return Fp8(suffix="_scale_inv", ways=frozenset({"block"}), block=_pair(said, "weight_block_size"))


def _pair(said: _Words, word: str) -> tuple[int, int]:
    found = said.said.get(word)
    whole = isinstance(found, list | tuple) and all(type(n) is int and n > 0 for n in found)
    if not whole or len(found) != 2:
        said.refuse(word)
    return found[0], found[1]
