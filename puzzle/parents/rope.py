"""Rotary positions (RoPE): frequencies and tables of every kind, derived here and nowhere else. Torch is imported when asked.

RoFormer (arXiv 2104.09864), linear and dynamic NTK scaling, YaRN (arXiv 2309.00071), LongRoPE (arXiv 2402.13753) and Llama 3.1,
by the field names and the functions of transformers' `modeling_rope_utils.py`. Letters: D head_dim, R rotary dimensions of a
head, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from puzzle.base.errors import UserError, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_WORDS = {  # of rope_parameters, beside those that every kind has
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
             "mscale_all_dim", "truncate"},
    "longrope": {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor",
                 "short_mscale", "long_mscale"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
}  # fmt: skip
KINDS = tuple(_WORDS)
_KINDS_OF: dict[str, tuple[type, ...]] = {
    "rope_type": (str, type(None)), "type": (str, type(None)), "truncate": (bool,), "short_factor": (list, tuple),
    "long_factor": (list, tuple),
}  # fmt: skip
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """One RoPE of a model. parameters: transformers' `rope_parameters` ({"rope_type", "rope_theta", "factor", ...});
    max_length: the model's max_position_embeddings. Raises UserError for a kind or a parameter that is not known."""

    head_dim: int
    max_length: int
    parameters: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"RoPE type '{self.kind}' is not supported: {nearest(self.kind, KINDS)}")
        if unknown := sorted(set(self.parameters) - _WORDS[self.kind] - _COMMON):
            raise UserError(f"RoPE of type '{self.kind}' has the parameter '{unknown[0]}', which is not understood")
        if "rope_theta" not in self.parameters:
            raise UserError(f"RoPE of type '{self.kind}' has no rope_theta: download the checkpoint again")
        for word, value in self.parameters.items():
            if not isinstance(value, _KINDS_OF.get(word, (int, float, type(None)))) or isinstance(value, bool) != (
                word == "truncate"
            ):
                raise UserError(
                    f"RoPE of type '{self.kind}' has {word} = {value!r}, which is no such value: correct config.json"
                )
        if any(self.parameters.get(word) is not None for word in ("short_mscale", "long_mscale")):
            raise UserError("RoPE of type 'longrope' with short_mscale or long_mscale is not supported")

    @property
    def kind(self) -> str:
        return str(self.parameters.get("rope_type") or self.parameters.get("type") or "default")

    @property
    def rotary_dim(self) -> int:
        """R: dimensions of a head that turn."""
        return int(self.head_dim * float(self.parameters.get("partial_rotary_factor") or 1.0))

    @property
    def original_length(self) -> int:
        """Tokens up to which the frequencies are the trained ones."""
        return int(self.parameters.get("original_max_position_embeddings") or self.max_length)

    @property
    def switches_at(self) -> int | None:
        """Sequences of more tokens than this have other frequencies at every position; None: all have the same."""
        return self.original_length if self.kind == "longrope" and self.original_length < self.max_length else None

    def frequencies(self, length: int = 1) -> tuple[Tensor, float]:
        """inv_freq [R/2] float32 on the CPU and the factor on cos and sin, for sequences of `length` tokens.

        Raises UserError where a dynamic RoPE would leave its trained length: its frequencies then depend on every step before.
        """
        if self.kind == "dynamic" and length > self.max_length:
            raise UserError(
                f"dynamic RoPE beyond {self.max_length} tokens ({length} asked for) changes with every step: not supported"
            )
        if self.kind in ("default", "dynamic"):  # dynamic NTK is the default up to the trained length
            import torch

            powers = torch.arange(0, self.rotary_dim, 2, dtype=torch.int64).float() / self.rotary_dim
            return 1.0 / (self.parameters["rope_theta"] ** powers), 1.0
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        asked = SimpleNamespace(
            rope_parameters={"original_max_position_embeddings": self.max_length, **self.parameters},
            max_position_embeddings=self.max_length,
            head_dim=self.head_dim,
            hidden_size=self.head_dim,
            num_attention_heads=1,
            standardize_rope_params=lambda: None,
        )
        return ROPE_INIT_FUNCTIONS[self.kind](asked, "cpu", seq_len=length)

    def tables(self, length: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """cos and sin of positions 0…length-1 of sequences of `length` tokens. [length, R] float32 each"""
        return self.tables_of(length, length, device)

    def tables_of(self, positions: int, length: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """cos and sin of positions 0…positions-1 of sequences of `length` tokens. [positions, R] float32 each"""
        import torch

        frequencies, scaling = self.frequencies(length)
        inv_freq = frequencies.to(device)
        angles = torch.arange(positions, dtype=torch.float32, device=device)[:, None] * inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * scaling, angles.sin() * scaling

    def timed(self) -> Rope:
        """As a clock sees it: of the default kind, with as many dimensions that turn."""
        kept = {
            name: value for name, value in self.parameters.items() if name in ("rope_theta", "partial_rotary_factor")
        }
        return replace(self, parameters={"rope_type": "default", **kept})

    def to_json(self) -> dict[str, Any]:
        return {"head_dim": self.head_dim, "max_length": self.max_length, "parameters": dict(self.parameters)}
