"""The reference parents with experts, as they train: a Qwen3-MoE and a hybrid of Nemotron-H's blocks, of our own modules.

Two modules run otherwise than served ones and give the same: experts that a token did not choose get the weight 0 instead of no
token, as all 16 together are small; Mamba-2 computes all chunks of a sequence at once. Each is one function for `torch.compile`.
Experts stay even by a loss of the router beside the model's (softmax, arXiv 2101.03961), or by a correction bias that goes up where
an expert has fewer than its share (sigmoid, arXiv 2408.15664).

Letters: B batch, T tokens, N rows (B·T), H hidden_size, E experts, K experts of a token, F channels of an expert, C chunks of L tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.mamba2 import Mamba2
from puzzle.blocklib.moe import Moe
from puzzle.blocklib.none import NO_OP
from puzzle.blocklib.plain.mamba2 import Mixer
from puzzle.blocklib.plain.moe import SparseMoe
from puzzle.blocklib.plain.part import Part, Ropes, learning
from puzzle.blocklib.plain.recurrent import RecurrentState
from puzzle.blocklib.sub_block import SubBlock
from puzzle.export.child import Child, ChildLayer
from puzzle.export.nemotron_h import hybrid_config, hybrid_tensors
from puzzle.export.qwen3_moe import qwen3_moe_config, qwen3_moe_tensors
from puzzle.parents.rope import Rope
from puzzle.parents.structure import Structure
from puzzle.runtime.model import Block, CausalModel

HIDDEN, CHUNK = 256, 64
AUXILIARY, BIAS_RATE = 0.01, 1e-3
PATTERN = "MEMEM*EMEMEM*EMEME"  # of the hybrid's blocks, in Nemotron-H's letters
NUM_LAYERS = {"qwen3_moe": 10, "nemotron_h_moe": len(PATTERN)}


def structure_of(family: str, num_layers: int, vocab_size: int, max_length: int) -> Structure:
    """About 15 M parameters with all layers: 16 experts in every mixture, of which a token has 4."""
    qwen = family == "qwen3_moe"
    size: dict[str, Any] = {"hidden_size": HIDDEN, "norm_eps": 1e-5}
    experts = {"num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": True}
    heads = {"num_attention_heads": 8, "head_dim": 32}
    if qwen:
        moe = Moe(**size, **experts, moe_intermediate_size=96)
        layers = [{"attention": Gqa(**size, **heads, num_key_value_heads=4, qk_norm="head"), "ffn": moe}] * num_layers
    else:
        routed = {"router": "sigmoid", "correction_bias": True, "routed_scaling_factor": 2.5, "activation": "relu2"}
        moe = Moe(**size, **experts, **routed, moe_intermediate_size=128, shared_intermediate_size=256)
        mamba = Mamba2(**size, num_heads=8, head_dim=64, num_groups=2, state_size=64)
        blocks = {
            "M": {"attention": mamba, "ffn": NO_OP},
            "*": {"attention": Gqa(**size, **heads, num_key_value_heads=2, rope=None), "ffn": NO_OP},
            "E": {"attention": NO_OP, "ffn": moe},
        }
        layers = [blocks[letter] for letter in PATTERN[:num_layers]]
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return Structure(
        **size,
        vocab_size=vocab_size,
        max_length=max_length,
        tied=qwen,
        ropes={"default": Rope(head_dim=32, max_length=max_length, parameters=rope)},
        layers=tuple(layers),
    )


class AllExperts(SparseMoe):
    """`seen` [2, E] is left behind: the share of all choices that each expert had, and its mean score, which has a gradient."""

    def mixed(self, x: Tensor) -> Tensor:
        own, experts = self.sub_block, self.experts
        chosen, weights = self.gate(x)
        scores = F.linear(x, self.gate.weight).float().softmax(-1)
        load = torch.zeros_like(scores).scatter(1, chosen, 1.0).mean(0) / own.num_experts_per_tok
        self.seen = torch.stack((load, scores.mean(0)))
        given = torch.zeros_like(scores).scatter(1, chosen, weights.to(scores.dtype))  # [N, E]
        channels = F.linear(x, experts.up_proj.flatten(0, 1))
        channels = experts.activation(F.linear(x, experts.gate_proj.flatten(0, 1)) if experts.gated else channels) * (
            channels if experts.gated else 1
        )
        weighted = channels.unflatten(-1, (own.num_experts, -1)) * given[..., None].to(channels.dtype)
        out = F.linear(weighted.flatten(-2), experts.down_proj.transpose(0, 1).flatten(1))
        return out + self.shared_expert(x) if own.shared_intermediate_size else out


class AllChunks(Mixer):
    def mixed(self, projected: Tensor, state: RecurrentState | None = None) -> Tensor:
        z, before, dt = projected.split(self.split, dim=-1)
        width, length = self.sizes.conv_width, before.shape[1]
        padded, taps = F.pad(before, (0, 0, width - 1, 0)).float(), self.conv1d.weight[:, 0].float()
        convolved = sum(padded[:, k : k + length] * taps[:, k] for k in range(width)) + self.conv1d.bias.float()
        x, b, c = self.parts(F.silu(convolved))
        y = scan(x, self.steps(dt), -self.A_log.float().exp(), b, c) + self.D.float()[:, None] * x
        return self.gate_norm(y.flatten(-2), z)


def scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """As `blocklib.plain.mamba2.scan`, of whole chunks. x [B, T, N, D], dt [B, T, N], a [N], b and c [B, T, G, S] -> [B, T, N, D]"""
    groups, dtype = b.shape[2], x.dtype
    length = min(CHUNK, x.shape[1])
    x, dt, b, c = (t.unflatten(1, (-1, length)) for t in (x, dt, b, c))
    values = (dt[..., None] * x).unflatten(3, (groups, -1))  # [B, C, L, G, N / G, D]
    # Of logarithms of decays, from the chunk's first token on [B, C, L, G, N / G].
    sums = (a * dt).cumsum(2).unflatten(3, (groups, -1))
    by_head = sums.movedim(2, -1)  # [B, C, G, N / G, L]
    before = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    decay = (by_head[..., :, None] - by_head[..., None, :]).masked_fill(~before, -torch.inf).exp()
    scores = torch.einsum("zclgs,zcmgs->zcglm", c, b)[:, :, :, None] * decay  # [B, C, G, N / G, L, L]
    y = torch.einsum("zcghlm,zcmghd->zclghd", scores.to(dtype), values)
    rest = (sums[:, :, -1:] - sums).exp()  # to the chunk's end
    added = torch.einsum("zcmghd,zcmgs->zcghds", rest[..., None] * values, b)  # to the state, by each chunk
    ends = sums[:, :, -1].cumsum(1)  # [B, C, G, N / G]
    earlier = torch.ones(len(ends[0]), len(ends[0]), dtype=torch.bool, device=x.device).tril(-1)
    # From a chunk's end to a later one's beginning.
    between = F.pad(ends, (0, 0, 0, 0, 1, 0))[:, :-1, None] - ends[:, None]
    between = between.masked_fill(~earlier[:, :, None, None], -torch.inf).exp()
    states = torch.einsum("zckgh,zkghds->zcghds", between, added.to(dtype))
    y = y + sums.exp()[..., None] * torch.einsum("zclgs,zcghds->zclghd", c, states)
    return y.flatten(3, 4).flatten(1, 2)


def part_of(sub_block: SubBlock) -> Part:
    """With the weights that training begins with: 0.02, and A, dt and D as Mamba-2's (arXiv 2405.21060)."""
    kind = {Moe: AllExperts, Mamba2: AllChunks}.get(type(sub_block))
    part: Part = sub_block.module() if kind is None else kind(sub_block)
    for name, parameter in part.named_parameters():
        owner = name.split(".")[-2:]
        if name == "A_log":
            nn.init.uniform_(parameter, 1, 16).log_()
        elif name == "dt_bias":
            steps = torch.empty_like(parameter).uniform_(math.log(1e-3), math.log(0.1)).exp()
            parameter.copy_(steps + torch.log(-torch.expm1(-steps)))
        elif parameter.ndim == 1:
            nn.init.constant_(parameter, 0.0 if "bias" in owner[-1] else 1.0)
        elif "conv1d" in owner:
            nn.init.uniform_(parameter, -0.5, 0.5)
        else:
            nn.init.normal_(parameter, std=0.02)
    return part


def contribution(part: Part, x: Tensor, ropes: Ropes) -> tuple[Tensor, Tensor | None]:
    """x with what the part adds, and of a mixture what was seen of its experts."""
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=x.is_cuda):
        return x + part(x, ropes), part.seen if isinstance(part, AllExperts) else None


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16, enabled=hidden.is_cuda):
        logits = F.linear(hidden, head)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Mixture(nn.Module):
    """A parent in training. compiled: for a GPU; one function for each kind of sub-block."""

    def __init__(self, structure: Structure, compiled: bool):
        super().__init__()
        with torch.no_grad():
            blocks = [Block({s: part_of(b) for s, b in layer.items()}) for layer in structure.layers]
            words = [torch.randn(structure.vocab_size, structure.hidden_size) * 0.02 for _ in range(2)]
            self.model = CausalModel(
                structure, words[0], blocks, torch.ones(structure.hidden_size), None if structure.tied else words[1]
            )
            for name, parameter in self.model.named_parameters():  # residual writers start smaller, as in the dense one
                if any(word in name for word in ("o_proj", "down_proj", "out_proj")):
                    parameter.div_(math.sqrt(2 * structure.num_layers))
        learning(self.model)
        make: Callable[..., Any] = torch.compile if compiled else lambda function: function
        self.contribution, self.cross_entropy = make(contribution), make(cross_entropy)

    @property
    def mixtures(self) -> list[AllExperts]:
        return [part for _, _, part in self.model.parts() if isinstance(part, AllExperts)]

    def loss(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """What is minimised, and the loads of the experts [mixtures, E]. ids [B, T + 1]"""
        x, ropes, seen = self.model.embed(ids[:, :-1]), self.model.ropes(ids.shape[1] - 1), []
        for _, _, part in self.model.parts():
            if part.sub_block != NO_OP:
                x, one = self.contribution(part, x, ropes)
                seen += [] if one is None else [one]
        loss, found = self.cross_entropy(self.model.final(x), self.model.head_weight, ids[:, 1:]), torch.stack(seen)
        if self.mixtures[0].sub_block.router == "softmax":
            loads, scores = found.unbind(1)
            loss = loss + AUXILIARY * found.shape[-1] * (loads.detach() * scores).sum(-1).mean()
        return loss, found[:, 0].detach()

    @torch.no_grad()
    def balance(self, loads: Tensor) -> None:
        """Move the correction biases. loads [mixtures, E]"""
        for part, load in zip(self.mixtures, loads, strict=True):
            if part.sub_block.correction_bias:
                part.gate.e_score_correction_bias += BIAS_RATE * (1 / len(load) - load).sign()

    @torch.no_grad()
    def save(self, out: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        """A plain Hugging Face checkpoint in bf16."""

        def stored(tensor: Tensor, exact: bool = False) -> Tensor:
            return tensor.detach().to("cpu", torch.float32 if exact else torch.bfloat16).contiguous()

        def read(part: Part) -> dict[str, Tensor]:
            return {name: stored(t, name in part.sub_block.exact) for name, t in part.state_dict().items()}

        model, structure = self.model, self.model.structure
        child = Child(
            name=out.name,
            layers=tuple(
                ChildLayer(slots=layer, reads={s: partial(read, getattr(block, s)) for s in layer}, origin=index)
                for index, (layer, block) in enumerate(zip(structure.layers, model.blocks, strict=True))
            ),
            around=structure.with_layers([]),
            base=structure.layers[0],
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype=torch.bfloat16,
            tokenizer=None,
            generation_config=None,
            parent_name=out.name,
            licence="apache-2.0",
            kept={f"{word}_token_id": getattr(tokenizer, f"{word}_token_id") for word in ("bos", "eos", "pad")},
            read_embedding=lambda: stored(model.embedding.weight),
            read_final_norm=lambda: stored(model.norm.weight),
            read_head=lambda: stored(model.head_weight),
        )
        if structure.tied:
            config, tensors = qwen3_moe_config(child), qwen3_moe_tensors(child)
        else:
            config, tensors = hybrid_config(child, "nemotron-h", None), hybrid_tensors(child, "nemotron-h")
        config.pop("parent_name", None)
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file({n: t.clone() for n, t in tensors}, out / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save_pretrained(out)
