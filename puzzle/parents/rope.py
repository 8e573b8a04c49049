"""Rotary positions (RoPE): frequencies and tables of every kind, derived here and nowhere else. Torch is imported when asked.

Formulas: RoFormer (arXiv 2104.09864), linear and dynamic NTK scaling, YaRN (arXiv 2309.00071), LongRoPE (arXiv 2402.13753) and
Llama 3.1, with the field names and the order of float32 operations of transformers' `modeling_rope_utils.py`, so that the
numbers are the same to the bit. Letters: D head_dim, R rotary dimensions of a head, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from puzzle.base.errors import UserError, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
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
            raise UserError(f"RoPE type '{self.kind}' is not supported: {nearest(self.kind, list(KINDS))}")
        if unknown := sorted(set(self.parameters) - _WORDS[self.kind] - _COMMON):
            raise UserError(f"RoPE of type '{self.kind}' has the parameter '{unknown[0]}', which is not understood")
        if "rope_theta" not in self.parameters:
            raise UserError(f"RoPE of type '{self.kind}' has no rope_theta: download the checkpoint again")
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
        import torch

        dim, theta = self.rotary_dim, self.parameters["rope_theta"]
        inv_freq = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
        if self.kind == "dynamic" and length > self.max_length:
            raise UserError(
                f"dynamic RoPE beyond {self.max_length} tokens ({length} asked for) changes with every step: not supported"
            )
        if self.kind in ("default", "dynamic"):  # dynamic NTK is the default up to the trained length
            return inv_freq, 1.0
        if self.kind == "linear":
            return inv_freq / self.parameters["factor"], 1.0
        if self.kind == "llama3":
            return self._llama3(inv_freq), 1.0
        return self._yarn() if self.kind == "yarn" else self._longrope(length)

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

    def _factor(self) -> float:
        factor = self.parameters.get("factor")
        return float(factor) if factor is not None else self.max_length / self.original_length

    def _llama3(self, inv_freq: Tensor) -> Tensor:
        import torch

        p = self.parameters
        low, high, factor, length = p["low_freq_factor"], p["high_freq_factor"], p["factor"], self.original_length
        wavelength = 2 * math.pi / inv_freq
        found = torch.where(wavelength > length / low, inv_freq / factor, inv_freq)
        smooth = (length / wavelength - low) / (high - low)
        smoothed = (1 - smooth) * found / factor + smooth * found
        medium = ~(wavelength < length / high) * ~(wavelength > length / low)
        return torch.where(medium, smoothed, found)

    def _yarn(self) -> tuple[Tensor, float]:
        import torch

        p, dim, theta, factor = self.parameters, self.rotary_dim, self.parameters["rope_theta"], self._factor()

        def mscale(weight: float = 1) -> float:
            return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

        scaling = p.get("attention_factor")
        if scaling is None:
            both = p.get("mscale") and p.get("mscale_all_dim")
            scaling = float(mscale(p["mscale"]) / mscale(p["mscale_all_dim"])) if both else mscale()

        def correction(turns: float) -> float:
            return (dim * math.log(self.original_length / (turns * 2 * math.pi))) / (2 * math.log(theta))

        low, high = correction(p.get("beta_fast") or 32), correction(p.get("beta_slow") or 1)
        if p.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high += 0.001 if low == high else 0
        ramp = 1 - torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
        powers = theta ** (torch.arange(0, dim, 2).float() / dim)
        return 1.0 / (factor * powers) * (1 - ramp) + 1.0 / powers * ramp, float(scaling)

    def _longrope(self, length: int) -> tuple[Tensor, float]:
        import torch

        p, dim, factor = self.parameters, self.rotary_dim, self._factor()
        scaling = p.get("attention_factor")
        if scaling is None:
            scaling = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(self.original_length))
        chosen = p["long_factor"] if length > self.original_length else p["short_factor"]
        exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
        stretch = torch.tensor(chosen, dtype=torch.float32)
        return 1.0 / (stretch * p["rope_theta"] ** exponents), float(scaling)

    def timed(self) -> Rope:
        """As a clock sees it: of the default kind, with as many dimensions that turn."""
        kept = {
            name: value for name, value in self.parameters.items() if name in ("rope_theta", "partial_rotary_factor")
        }
        return replace(self, parameters={"rope_type": "default", **kept})

    def to_json(self) -> dict[str, Any]:
        return {"head_dim": self.head_dim, "max_length": self.max_length, "parameters": dict(self.parameters)}
