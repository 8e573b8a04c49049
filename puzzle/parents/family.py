"""One interface over the supported families: layer specs and plain weights in, whatever the checkpoint calls them.

Llama, Mistral, Qwen2, Qwen3, our own children and DeciLM (nemotron-nas) name their weights alike; they differ in biases,
per-head norms and windows, which `_FAMILIES` lists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puzzle.base.errors import UserError, nearest
from puzzle.blocklib.layer import Kind, LayerSpec, ParentLayer, attention_shapes, ffn_shapes
from puzzle.parents.checkpoint import Checkpoint
from puzzle.parents.nemotron_nas import as_child

_NORM = {"attention": "input_layernorm", "ffn": "post_attention_layernorm"}
_MODULE = {"attention": "self_attn", "ffn": "mlp"}
_LINEAR = {"attention": "linear_attn", "ffn": "linear_mlp"}


def hf_name(layer: int, kind: Kind, name: str) -> str:
    """The checkpoint's name of a sub-block's tensor: (3, "ffn", "norm.weight") -> "model.layers.3.post_att…"."""
    owner, _, rest = name.partition(".")
    if owner == "norm":
        return f"model.layers.{layer}.{_NORM[kind]}.{rest}"
    if owner == "linear":
        return f"model.layers.{layer}.{_MODULE[kind]}.{_LINEAR[kind]}.{rest}"
    return f"model.layers.{layer}.{_MODULE[kind]}.{name}"


def _llama(config: dict[str, Any]) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(config.get("mlp_bias", False))}


def _mistral(config: dict[str, Any]) -> dict[str, Any]:
    return {"window": config.get("sliding_window")}


def _qwen2(config: dict[str, Any]) -> dict[str, Any]:
    _reject_mixed_windows(config)
    return {"qkv_bias": True}


def _qwen3(config: dict[str, Any]) -> dict[str, Any]:
    _reject_mixed_windows(config)
    bias = bool(config.get("attention_bias", False))
    return {"qkv_bias": bias, "o_bias": bias, "qk_norm": True}


def _puzzle(config: dict[str, Any]) -> dict[str, Any]:
    return {
        **_llama(config),
        "qkv_bias": bool(config.get("attention_bias") or config.get("qkv_bias")),
        "qk_norm": bool(config.get("qk_norm")),
        "window": config.get("sliding_window"),
    }


def _reject_mixed_windows(config: dict[str, Any]) -> None:
    if config.get("use_sliding_window"):
        raise UserError(
            "use_sliding_window = true in config.json: parents with windows in some layers only are not "
            "supported; set it to false if the checkpoint allows it"
        )


_FAMILIES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "puzzle": _puzzle,
}


@dataclass(frozen=True, kw_only=True)
class HfModel:
    """A checkpoint opened for reading: a parent, or a child that `puzzle export` wrote."""

    source: str  # the directory or hub id as the user gave it
    checkpoint: Checkpoint
    spec: LayerSpec
    num_layers: int
    vocab_size: int
    max_length: int
    tied: bool

    @property
    def directory(self) -> Path:
        return self.checkpoint.directory

    @property
    def config(self) -> dict[str, Any]:
        return self.checkpoint.config

    def layer(self, index: int) -> ParentLayer:
        """All weights of one layer, in the checkpoint's dtype, on the CPU (parents only: every layer alike)."""
        weights: dict[str, dict[str, Tensor]] = {}
        for kind, shapes in (("attention", attention_shapes(self.spec)), ("ffn", ffn_shapes(self.spec))):
            weights[kind] = {name: self.checkpoint.tensor(hf_name(index, kind, name)) for name in shapes}  # type: ignore[arg-type]
        return ParentLayer(index=index, spec=self.spec, attention=weights["attention"], ffn=weights["ffn"])

    def embedding(self) -> Tensor:
        """[vocab_size, H]"""
        return self.checkpoint.tensor("model.embed_tokens.weight")

    def final_norm(self) -> Tensor:
        """[H]"""
        return self.checkpoint.tensor("model.norm.weight")

    def lm_head(self) -> Tensor:
        """[vocab_size, H]; the embedding when tied"""
        return self.embedding() if self.tied else self.checkpoint.tensor("lm_head.weight")

    def check(self) -> None:
        """Raise UserError when a weight is missing, of the wrong shape, NaN or infinite. Reads every weight once."""
        found = self.checkpoint.shapes()
        hidden, vocab = self.spec.hidden_size, self.vocab_size
        wanted: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (vocab, hidden),
            "model.norm.weight": (hidden,),
        }
        if not self.tied:
            wanted["lm_head.weight"] = (vocab, hidden)
        for index in range(self.num_layers):
            for kind, shapes in (("attention", attention_shapes(self.spec)), ("ffn", ffn_shapes(self.spec))):
                wanted |= {hf_name(index, kind, name): shape for name, shape in shapes.items()}  # type: ignore[arg-type]
        for name, shape in wanted.items():
            if name not in found:
                raise UserError(f"{self.directory} lacks the weight {name}: download or export the checkpoint again")
            if found[name] != shape:
                raise UserError(
                    f"weight {name} in {self.directory} has shape {list(found[name])}, config.json asks for "
                    f"{list(shape)}: the config does not belong to these weights"
                )
        for name in wanted:
            self.checkpoint.tensor(name)


def open_model(source: str | Path) -> HfModel:
    """Open a local Hugging Face directory or, when there is none of that name, a hub id ("org/name").

    Raises UserError for a missing directory or config, an unsupported architecture, or missing config values.
    """
    directory = Path(source)
    if not directory.exists() and str(source).count("/") == 1 and not str(source).startswith((".", "/", "~")):
        directory = _download(str(source))
    checkpoint = Checkpoint(directory)
    if checkpoint.config.get("model_type") == "nemotron-nas":
        checkpoint.config = as_child(checkpoint.config, directory)
    config = checkpoint.config
    model_type = config.get("model_type")
    if model_type not in _FAMILIES:
        hint = nearest(str(model_type), sorted(_FAMILIES))
        raise UserError(
            f"{directory} is a '{model_type}' model, which is not supported; {hint} (supported: {', '.join(_FAMILIES)})"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{directory} uses hidden_act '{config['hidden_act']}': only SwiGLU (silu) FFNs are supported")
    try:
        heads = int(config["num_attention_heads"])
        hidden = int(config["hidden_size"])
        inv_freq, scaling = _rope(directory)
        spec = LayerSpec(
            hidden_size=hidden,
            num_attention_heads=heads,
            num_key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            intermediate_size=int(config["intermediate_size"]),
            rms_norm_eps=float(config["rms_norm_eps"]),
            inv_freq=inv_freq,
            rope_scaling=scaling,
            **_FAMILIES[model_type](config),
        )
        return HfModel(
            source=str(source),
            checkpoint=checkpoint,
            spec=spec,
            num_layers=int(config["num_hidden_layers"]),
            vocab_size=int(config["vocab_size"]),
            max_length=int(config.get("max_position_embeddings", 2048)),
            tied=bool(config.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise UserError(f"{directory}/config.json lacks {error}: download the checkpoint again") from error


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"])
        )
    except Exception as error:  # the hub client raises many kinds; all mean that there is no such model to read
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"'{hub_id}' is neither a local directory nor a model that the hub gives ({reason}): "
            "check the spelling, or download it and pass the directory"
        ) from error


def _rope(directory: Path) -> tuple[tuple[float, ...], float]:
    """RoPE frequencies [D/2] and the factor on cos and sin, by transformers' own rules for this config."""
    import json

    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    keys = (
        "hidden_size",
        "num_attention_heads",
        "head_dim",
        "max_position_embeddings",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
    )
    config = LlamaConfig(**{k: raw[k] for k in keys if raw.get(k) is not None})
    parameters = dict(config.rope_parameters or {})
    kind = parameters.get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise UserError(
            f"RoPE type '{kind}' in {directory}/config.json changes with the length: not supported; "
            "supported: default, linear, yarn, llama3"
        )
    if kind == "default":
        dim = int(config.head_dim or config.hidden_size // config.num_attention_heads)
        exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
        return tuple((1.0 / parameters["rope_theta"] ** exponents).tolist()), 1.0
    if kind not in ROPE_INIT_FUNCTIONS:
        raise UserError(
            f"RoPE type '{kind}' in {directory}/config.json is unknown; supported: default, linear, yarn, llama3"
        )
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, device=torch.device("cpu"))
    return tuple(inv_freq.tolist()), float(scaling)
