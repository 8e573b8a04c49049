"""What orders hidden channels and layers: one pass of the parent over calibration text, a layer in memory at a time.

Letters: B sequences of a batch, T tokens, H hidden_size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzle.base.console import progress
from puzzle.blocklib.mamba2 import Mamba2
from puzzle.blocklib.moments import Statistics
from puzzle.parents.opened import HfModel
from puzzle.runtime.stream import Layered

NORMS = ("norm", "post_norm")  # of a part, over hidden channels


@dataclass(slots=True)
class Use:
    """Of one norm over all tokens, in float64: Σ |what it gives| and Σ (x / rms(x))², by hidden channel [H]."""

    num_tokens: int = 0
    given: Any = 0.0
    energy: Any = 0.0

    def note(self, norm: Any, entered: tuple[Tensor], given: Tensor) -> None:
        """As a forward hook."""
        x = entered[0].flatten(0, -2).float()
        unit = F.rms_norm(x, x.shape[-1:], None, norm.eps).double()
        self.num_tokens += len(x)
        self.given = self.given + given.flatten(0, -2).double().abs().sum(dim=0).cpu()
        self.energy = self.energy + (unit * unit).sum(dim=0).cpu()

    def scale(self, channels: Tensor) -> float:
        """By how much the norm's scale grows where these channels alone are left: their root mean square, once it was 1 over all of
        them. Channels that were always 0 are left out for nothing so."""
        return float((self.energy[channels].mean() / self.num_tokens).sqrt())


@dataclass(kw_only=True, slots=True)
class ParentStatistics:
    """norms: by (layer, slot, name of the norm). final: of the norm before the head. influence: of every layer, 1 - the mean cosine of
    what enters and leaves it (ShortGPT, arXiv 2403.03853). mixers: of Mamba-2, by (layer, slot), what its channels contribute."""

    norms: dict[tuple[int, str, str], Use] = field(default_factory=dict)
    final: Use = field(default_factory=Use)
    influence: list[float] = field(default_factory=list)
    mixers: dict[tuple[int, str], Statistics] = field(default_factory=dict)

    def best_layers(self, count: int) -> list[int]:
        """The `count` layers that turn the residual stream most, in order."""
        order = sorted(range(len(self.influence)), key=lambda index: -self.influence[index])
        return sorted(order[:count])

    def best_channels(self, count: int, layers: list[int]) -> Tensor:
        """The `count` hidden channels that norms give most of, in order: by the mean |output|, summed over the norms of these layers
        and the final one (Minitron, arXiv 2407.14679, section 2.2). [count]"""
        uses = [use for (index, _, _), use in self.norms.items() if index in layers] + [self.final]
        given = torch.stack([use.given / use.num_tokens for use in uses]).sum(dim=0)
        return given.argsort(descending=True, stable=True)[:count].sort().values


@torch.no_grad()
def gather(
    parent: HfModel, sequences: Tensor, device: torch.device, dtype: torch.dtype, *, mixers: bool, batch_size: int = 8
) -> ParentStatistics:
    """Over calibration sequences [S, T]. mixers: of Mamba-2 too."""
    layered, found = Layered(parent, device, dtype, streamed=True), ParentStatistics()
    streams = list(layered.embedded(ids.long() for ids in sequences.split(batch_size)))
    ropes = layered.ropes(sequences.shape[1])
    with progress("calibrate", parent.structure.num_layers) as bar:
        for index, block in layered.blocks():
            entered = streams
            for slot, part in block.parts().items():
                if mixers and isinstance(part.sub_block, Mamba2):
                    whole = part.calibrate(streams)
                    assert whole is not None
                    found.mixers[index, slot] = replace(whole, channel_gram=None)  # which would keep the streams
                for name in NORMS:
                    if hasattr(part, name):  # the part is thrown away with its hooks
                        use = found.norms[index, slot, f"{name}.weight"] = Use()
                        getattr(part, name).register_forward_hook(use.note)
                streams = [part.add(x, ropes) for x in streams]
            pairs = zip(entered, streams, strict=True)
            turned = [1 - F.cosine_similarity(x.float(), y.float(), dim=-1).double() for x, y in pairs]
            found.influence.append(torch.cat(turned).mean().item())
            bar.advance()
    last = layered.last()
    last.norm.register_forward_hook(found.final.note)
    for x in streams:
        last.norm(x)
    return found
