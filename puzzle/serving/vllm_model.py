"""A child in vLLM: layers of sub-blocks' own faces (`puzzle/blocklib/vllm/`), and what stands around them. Imported by vLLM alone.

The residual stream is a pair, what the last sub-block added and the stream before it, so that one kernel adds and norms; at the start,
however many layers are empty, there is only the embedding. Letters: T tokens of all sequences, H hidden_size, R rotary dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
import vllm
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsPP, SupportsQuant
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    WeightsMapper,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from puzzle.blocklib.gated_delta import GatedDelta
from puzzle.blocklib.sub_block import Normed
from puzzle.blocklib.vllm.moe import one_by_one
from puzzle.blocklib.vllm.place import Place, rms_norm
from puzzle.parents.names import MATRICES, NORMS, module_of
from puzzle.parents.rope import Rope
from puzzle.parents.structure import Layer, Structure
from puzzle.serving.vllm_plugin import (
    ServedConfig,
    attentions,
    check_version,
    logger,
    missing_tensors,
    recurrents,
    wanted_tensors,
)

PER_GROUP_SINCE = (0, 29)  # FlashAttention plans with the KV heads of the layers that it plans for
# Backends that take each layer's own (ROCM_AITER_FA does not, in 0.26 to 0.32).
PER_LAYER = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION", "CPU_ATTN")
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
STACKED = {".q_proj": (".qkv_proj", "q"), ".k_proj": (".qkv_proj", "k"), ".v_proj": (".qkv_proj", "v"),
           **{f".{owner}.{name}": (f".{owner}.gate_up_proj", place)  # of experts, vLLM's own layer stacks them
              for owner in ("mlp", "shared_expert") for place, name in enumerate(("gate_proj", "up_proj"))}}  # fmt: skip


def plan_each_group_by_its_own_kv_heads() -> None:
    """Mend vLLM 0.26 to 0.28 in place: FlashAttention 3's plan took the model-wide number of KV heads for every layer, and layers with
    another number answered wrongly without a word. vLLM 0.29 and later do the same as this (vllm-project/vllm pull requests 53002 and 53336).
    """
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder as Builder

    if getattr(Builder, "mended_by_puzzle", False):
        return
    first = Builder.__init__

    def init(self: Any, kv_cache_spec: Any, *args: Any, **kwargs: Any) -> None:
        first(self, kv_cache_spec, *args, **kwargs)
        self.num_heads_kv = kv_cache_spec.num_kv_heads

    Builder.__init__ = init
    Builder.mended_by_puzzle = True


def check_backends(model: nn.Module) -> None:
    """Raise ValueError for an attention backend of which nobody read that it takes each layer's own number of KV heads."""
    used = {part.attn_backend.get_name() for part in model.modules() if isinstance(part, Attention)}
    if unread := sorted(used - set(PER_LAYER)):
        raise ValueError(
            f"this child's layers differ in KV heads, which attention backend {unread[0]} may take from the whole model: pass "
            f"--attention-backend {' or '.join(PER_LAYER)}"
        )


class PuzzleRotary(RotaryEmbedding):
    """vLLM's rotary embedding with the frequencies that puzzle knows for every kind of RoPE (`puzzle/parents/rope.py`)."""

    def __init__(self, rope: Rope, max_model_len: int):
        self.rope, self.max_model_len = rope, max_model_len
        if rope.switches_at is not None and rope.switches_at < max_model_len:
            logger.warning(
                "longrope: with max_model_len %d sequences of up to %d tokens have the frequencies of longer ones too, as in "
                "vLLM's Phi-3; the trained ones with max_model_len %d",
                max_model_len,
                rope.switches_at,
                rope.switches_at,
            )
        super().__init__(
            rope.head_dim,
            rope.rotary_dim,
            max_model_len,
            rope.parameters["rope_theta"],
            True,
            torch.get_default_dtype(),
        )

    def _compute_cos_sin_cache(self) -> Tensor:
        """[max_model_len, R]: half cos, half sin"""
        with torch.device("cpu"):
            tables = self.rope.tables(self.max_model_len)
        half = self.rotary_dim // 2
        return torch.cat([table[:, :half] for table in tables], dim=-1).to(torch.get_default_device())


class PuzzleLayer(nn.Module):
    """One layer: the faces of its sub-blocks, between norms that have the checkpoint's names."""

    def __init__(self, layer: Layer, place: Place):
        super().__init__()
        self.parts: list[tuple[str, str, str, float]] = []  # of the face, of the norms before and after; the scale
        for slot, sub_block in layer.items():
            name = module_of(slot, sub_block)
            face = sub_block.in_vllm(replace(place, prefix=f"{place.prefix}.{name}", matrix=MATRICES[slot]))
            if face is None:
                continue
            self.add_module(name, face)
            assert isinstance(sub_block, Normed)
            before, after = NORMS[sub_block.norm, slot]
            for norm in filter(None, (before, after)):
                self.add_module(norm, rms_norm(sub_block.hidden_size, sub_block))
            self.parts.append((name, before, after, sub_block.residual_scale))

    def forward(self, positions: Tensor, added: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """added, stream [T, H]: their sum is the residual stream; stream is None before the first sub-block."""
        for name, before, after, scale in self.parts:
            if not before:
                stream = added if stream is None else added + stream
                entered = stream
            elif stream is None:
                stream, entered = added, getattr(self, before)(added)
            else:
                entered, stream = getattr(self, before)(added, stream)
            added = getattr(self, name)(positions, entered)
            added = getattr(self, after)(added) if after else added
            added = added if scale == 1 else added * scale
        return added, stream


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "intermediate_tensors": 0, "inputs_embeds": 0})
class PuzzleModel(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, *, vllm_config: VllmConfig, structure: Structure, prefix: str = ""):
        super().__init__()
        group, size, quant = get_pp_group(), structure.hidden_size, vllm_config.quant_config
        tied = vllm_config.model_config.hf_config.tie_word_embeddings
        self.embed_tokens: nn.Module = PPMissingLayer()
        if group.is_first_rank or (tied and group.is_last_rank):
            self.embed_tokens = VocabParallelEmbedding(
                structure.vocab_size, size, quant_config=quant, prefix=f"{prefix}.embed_tokens"
            )
        # as transformers rounds it
        self.embedding_scale = torch.tensor(structure.embedding_scale, dtype=torch.get_default_dtype()).item()
        place = Place(
            prefix=prefix,
            matrix="",
            quant_config=quant,
            cache_config=vllm_config.cache_config,
            ropes={
                name: PuzzleRotary(rope, vllm_config.model_config.max_model_len)
                for name, rope in structure.ropes.items()
            },
            num_ranks=get_tensor_model_parallel_world_size(),
        )

        def layer(prefix: str) -> PuzzleLayer:
            return PuzzleLayer(structure.layers[int(prefix.rpartition(".")[2])], replace(place, prefix=prefix))

        self.start_layer, self.end_layer, self.layers = make_layers(
            structure.num_layers, layer, prefix=f"{prefix}.layers"
        )
        self.norm: nn.Module = PPMissingLayer()
        if group.is_last_rank:
            self.norm = (GemmaRMSNorm if structure.norm_offset else RMSNorm)(size, eps=structure.norm_eps)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(["added", "stream"], size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """[T] -> [T, H]"""
        x = self.embed_tokens(input_ids)
        return x if self.embedding_scale == 1 else x * self.embedding_scale

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        stream: Tensor | None
        if not get_pp_group().is_first_rank:
            assert intermediate_tensors is not None
            added, stream = intermediate_tensors["added"], intermediate_tensors["stream"]
        else:
            if inputs_embeds is None:
                assert input_ids is not None
                inputs_embeds = self.embed_input_ids(input_ids)
            added, stream = inputs_embeds, None
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            added, stream = layer(positions, added, stream)
        if not get_pp_group().is_last_rank:
            stream = torch.zeros_like(added) if stream is None else stream
            return IntermediateTensors({"added": added, "stream": stream})
        return self.norm(added) if stream is None else self.norm(added, stream)[0]


class PuzzleForCausalLM(nn.Module, SupportsPP, SupportsQuant):
    """PuzzleModel with a language-model head. Raises ValueError for a vLLM, or a number of ranks, that cannot serve the child."""

    packed_modules_mapping = PACKED

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: ServedConfig = vllm_config.model_config.hf_config
        self.structure, self.tied = config.structure(), config.tie_word_embeddings
        kv_heads = {attention.num_key_value_heads for attention in attentions(self.structure)}
        if check_version(vllm.__version__) < PER_GROUP_SINCE and len(kv_heads) > 1:
            plan_each_group_by_its_own_kv_heads()
        self.model = PuzzleModel(
            vllm_config=vllm_config, structure=self.structure, prefix=maybe_prefix(prefix, "model")
        )
        if len(kv_heads) > 1:
            check_backends(self.model)
        self.lm_head: nn.Module = PPMissingLayer()
        if get_pp_group().is_last_rank:
            head = ParallelLMHead(
                self.structure.vocab_size,
                self.structure.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            self.lm_head = head.tie_weights(self.model.embed_tokens) if self.tied else head
        self.logits_processor = LogitsProcessor(self.structure.vocab_size, scale=1 / self.structure.logits_divisor)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        self.loaded = False

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint, whole the first time. Raises ValueError for a tensor that is missing, or that the child has no place for."""
        wanted, seen = wanted_tensors(self.structure, self.tied), set()

        def noted() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name.endswith((".weight", ".bias")) and name not in wanted:  # vLLM's loader would skip a bias
                    raise ValueError(
                        f"the checkpoint has {name}, for which config.json has no place: export the child again"
                    )
                seen.add(name)
                yield from one_by_one(name, tensor)

        gated = any("gate_proj" in name for _, _, sub_block in self.structure for name in sub_block.tensors())
        stacked = {name: place for name, place in STACKED.items() if gated or "gate_up_proj" not in place[0]}
        mapper = WeightsMapper(orig_to_new_stacked=stacked, orig_to_new_substr={".mamba.A_log": ".mamba.A"})
        done = AutoWeightsLoader(self).load_weights(noted(), mapper=mapper)
        if not self.loaded and (missing := sorted(missing_tensors(wanted, seen))):
            raise ValueError(
                f"the checkpoint lacks {missing[0]} ({len(missing)} tensors in all): export the child again"
            )
        self.loaded = True
        return done


class PuzzleHybridForCausalLM(PuzzleForCausalLM, HasInnerState, IsHybrid):
    """A child with a recurrent kind. vLLM sizes pages by the largest state of a layer; each layer's own may be smaller."""

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        from vllm.model_executor.layers.mamba.mamba_utils import MambaStateDtypeCalculator

        cache = vllm_config.cache_config
        return MambaStateDtypeCalculator.mamba2_state_dtype(
            vllm_config.model_config.dtype, cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype
        )

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> Any:
        from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator

        structure = vllm_config.model_config.hf_config.structure()
        largest: Any = max(recurrents(structure), key=lambda m: m.state().fixed_bytes("bf16"))
        tp, num_spec = vllm_config.parallel_config.tensor_parallel_size, vllm_config.num_speculative_tokens
        if isinstance(largest, GatedDelta):
            heads, dims = (largest.num_key_heads, largest.num_value_heads), (largest.key_dim, largest.value_dim)
            return MambaStateShapeCalculator.gated_delta_net_state_shape(
                tp, *heads, *dims, largest.conv_width, num_spec
            )
        return MambaStateShapeCalculator.mamba2_state_shape(
            intermediate_size=largest.inner_size,
            tp_world_size=tp,
            n_groups=largest.num_groups,
            num_heads=largest.num_heads,
            head_dim=largest.head_dim,
            state_size=largest.state_size,
            conv_kernel=largest.conv_width,
            num_spec=num_spec,
        )

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator

        return MambaStateCopyFuncCalculator.mamba2_state_copy_func()
