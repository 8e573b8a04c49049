"""gpt-oss: attention with sinks, a window in every other layer, and experts with biases and a clamped SwiGLU.

Gate and up are stored as one, channel by channel in turn: in bf16 transposed, [E, H, 2 F] and [E, F, H]; in MXFP4 as they are.
"""

from __future__ import annotations

from puzzle.base.errors import UserError
from puzzle.blocklib.moe import Moe
from puzzle.blocklib.sub_block import SubBlock
from puzzle.parents.family import Config, attention, decoder, family, windows
from puzzle.parents.mxfp4 import BLOCKS
from puzzle.parents.names import MODULES, Where, hf_name
from puzzle.parents.structure import Layer, Structure

TURNS = {"gate_proj": (0, 2), "up_proj": (1, 2)}  # of a matrix in `gate_up_proj`


def in_bf16(layer: int, slot: str, sub_block: SubBlock, name: str) -> Where:
    return _where(layer, slot, sub_block, name, packed=False)


def in_mxfp4(layer: int, slot: str, sub_block: SubBlock, name: str) -> Where:
    return _where(layer, slot, sub_block, name, packed=True)


def _where(layer: int, slot: str, sub_block: SubBlock, name: str, packed: bool) -> Where:
    owner, _, inside = name.partition(".")
    if not isinstance(sub_block, Moe) or owner not in ("gate", "experts"):
        return Where(hf_name(layer, slot, sub_block, name))
    stem = f"model.layers.{layer}.{MODULES[slot]}"
    if owner == "gate":
        return Where(f"{stem}.router.{inside}")
    matrix, is_bias = inside.removesuffix("_bias"), inside.endswith("_bias")
    stored = f"{stem}.experts.{'gate_up_proj' if matrix in TURNS else matrix}"
    if is_bias:
        return Where(f"{stored}_bias", turn=TURNS.get(matrix), dim=1)
    if packed:
        return Where(f"{stored}{BLOCKS}", turn=TURNS.get(matrix), dim=1, packed=True)
    return Where(stored, turn=TURNS.get(matrix), dim=2, transposed=True)


def base(c: Config) -> Layer:
    """What a layer without a window has."""
    return layer_of(c, None)


def layer_of(c: Config, window: int | None) -> Layer:
    """window: tokens that a query sees; None: all. Raises UserError for another activation, or other constants of it."""
    for name, known in (("hidden_act", "silu"), ("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)):
        if (value := c.get(name, known)) != known:
            raise UserError(f"{name} = {value!r} in config.json is not supported for gpt_oss: {known} is")
    experts = Moe(
        hidden_size=c["hidden_size"],
        norm_eps=float(c["rms_norm_eps"]),
        num_experts=c["num_local_experts"],
        num_experts_per_tok=c["num_experts_per_tok"],
        moe_intermediate_size=c["intermediate_size"],
        activation="swiglu_oai",
        bias=True,
        norm_topk_prob=True,
    )
    return {"attention": attention(c, window=window, sinks=True), "ffn": experts}


@family("gpt_oss", where=in_bf16, other_layouts=(in_mxfp4,), base=base)
def gpt_oss(c: Config) -> Structure:
    """A softmax over the chosen experts is one over all of them, divided by the sum of the chosen."""
    c["sliding_window"]  # which nothing reads where no layer has one
    return decoder(c, [layer_of(c, window) for window in windows(c)])
