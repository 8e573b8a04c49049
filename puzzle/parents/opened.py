"""A checkpoint opened for reading: a parent of any family, or a child that `puzzle export` wrote."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puzzle.base.errors import UserError, first_line, nearest
from puzzle.blocklib.sub_block import ParentBlock, SubBlock
from puzzle.data.tokenizer import TOKENIZER_FILES
from puzzle.parents import mxfp4
from puzzle.parents.checkpoint import LICENCE_FILES, Checkpoint
from puzzle.parents.family import FAMILIES, Family, refuse
from puzzle.parents.fp8 import STORED
from puzzle.parents.names import EMBEDDING, FINAL_NORM, HEAD, Where
from puzzle.parents.structure import Layer, Structure

MODULES = (
    "llama", "qwen", "phi3", "gemma3", "olmo", "granite", "smollm3", "exaone4", "nemotron_h", "qwen3_moe", "gpt_oss", "child",
    "nemotron_nas",
)  # fmt: skip
NEUTRAL = {  # fields that change no output: of training, of generation, and what transformers has written into others by now
    "attention_dropout", "residual_dropout", "embd_pdrop", "resid_pdrop", "initializer_range", "use_cache", "bos_token_id", "eos_token_id",
    "pad_token_id", "pretraining_tp", "max_window_layers", "use_sliding_window", "original_max_position_embeddings",
    "no_rope_layer_interval", "num_hidden_layers", "sliding_window_pattern", "output_router_logits", "router_aux_loss_coef",
}  # fmt: skip
READ = ("BF16", "F16", "F32", "F64")  # dtypes of weights, as safetensors names them
QUANTISED = ("quantization_config", "compression_config")  # which `Checkpoint` has read
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
MOST_LAYERS = 10**5  # a structure is made of them before anything is read
# Their config classes come with the checkpoint, which stays unread.
OWN_CONFIGS = ("puzzle", "nemotron-nas", "nemotron_h_puzzle")


@dataclass(frozen=True, kw_only=True)
class HfModel:
    """source: the directory or hub id as the user gave it. config: config.json as it stands."""

    source: str
    checkpoint: Checkpoint
    family: Family
    structure: Structure
    base: Layer  # what a layer has where nothing is said of it

    @property
    def directory(self) -> Path:
        return self.checkpoint.directory

    @property
    def config(self) -> dict[str, Any]:
        return self.checkpoint.config

    def block(self, layer: int, slot: str) -> ParentBlock:
        """One sub-block with its weights, in the checkpoint's dtype (float32 for those in fp8), on the CPU."""
        sub_block = self.structure.layers[layer][slot]
        return ParentBlock(sub_block=sub_block, weights=self.weights(layer, slot))

    def weights(self, layer: int, slot: str) -> dict[str, Tensor]:
        """{name inside the sub-block: tensor} of one sub-block."""
        sub_block = self.structure.layers[layer][slot]
        places = {name: self.family.where(layer, slot, sub_block, name) for name in sub_block.tensors()}
        return {name: self._tensor(where) for name, where in places.items()}

    def _tensor(self, where: Where) -> Tensor:
        if where.experts is not None:
            return self.checkpoint.stacked(where.names)
        return where.taken(self.checkpoint.tensor(where.name, where.rows, where.dim))

    def fingerprint(self) -> str:
        """As the checkpoint's."""
        return self.checkpoint.fingerprint()

    def embedding(self) -> Tensor:
        """[vocab_size, H]"""
        return self.checkpoint.tensor(self.embedding_name)

    @property
    def embedding_name(self) -> str:
        """A tied checkpoint may hold the one matrix under the head's name."""
        return HEAD if self.structure.tied and EMBEDDING not in self.checkpoint.names else EMBEDDING

    def final_norm(self) -> Tensor:
        """[H]"""
        return self.checkpoint.tensor(FINAL_NORM)

    def lm_head(self) -> Tensor:
        """[vocab_size, H]; the embedding when tied"""
        return self.checkpoint.tensor(self.embedding_name if self.structure.tied else HEAD)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the structure asks for, as the checkpoint holds them."""
        vocab, hidden = self.structure.vocab_size, self.structure.hidden_size
        wanted: dict[str, tuple[int, ...]] = {self.embedding_name: (vocab, hidden), FINAL_NORM: (hidden,)}
        if not self.structure.tied:
            wanted[HEAD] = (vocab, hidden)
        for layer, slot, sub_block in self.structure:
            for name, shape in sub_block.tensors().items():
                where = self.family.where(layer, slot, sub_block, name)
                for stored in where.names:  # rows of one tensor: as far as the last of them
                    wanted[stored] = max(where.stored_shape(shape), wanted.get(stored, ()))
        return wanted

    def check_shapes(self) -> None:
        """Raise UserError when a weight is missing or of the wrong shape or dtype. Reads headers alone."""
        entries, fp8 = self.checkpoint.entries(), self.checkpoint.fp8
        wanted = self.shapes()
        if self.checkpoint.mxfp4 and not any(name.endswith(mxfp4.BLOCKS) for name in wanted):
            raise UserError(
                f"quantization_config in {self.directory}/config.json says mxfp4, and no experts are stored so: take it out, or download "
                "the checkpoint again"
            )
        if fp8 is not None and all(entries[name]["dtype"] != STORED for name in wanted.keys() & entries.keys()):
            raise UserError(
                f"quantization_config in {self.directory}/config.json says fp8, and no weight is stored as {STORED}: take it out, or "
                "download the checkpoint again"
            )
        for name, shape in wanted.items():
            if name not in entries:
                raise UserError(f"{self.directory} lacks the weight {name}: download or export the checkpoint again")
            dtype, found = entries[name]["dtype"], tuple(entries[name]["shape"])
            if dtype == STORED and fp8 is not None:
                fp8.check(name, entries)
            elif dtype == mxfp4.STORED and name.endswith(mxfp4.BLOCKS) and self.checkpoint.mxfp4:
                mxfp4.check(name, entries)
            elif dtype not in READ:
                raise UserError(
                    f"weight {name} in {self.directory} is stored as {dtype}: quantised weights are not read; "
                    f"dequantise the checkpoint to {' or '.join(READ)}"
                )
            if found != shape:
                raise UserError(
                    f"weight {name} in {self.directory} has shape {list(found)}, config.json asks for "
                    f"{list(shape)}: the config does not belong to these weights"
                )

        if self.config["model_type"] == "puzzle":
            self._check_no_more(wanted)

    def _check_no_more(self, wanted: Collection[str]) -> None:
        """Raise UserError for a weight of a layer that the config of a child says nothing of: a word of a later puzzle, or a lost one."""
        for name in sorted(self.checkpoint.names - set(wanted)):
            if name.startswith("model.layers.") and not name.endswith("_scale"):
                raise UserError(
                    f"{self.directory} has the weight {name}, for which its config.json has no place: a later puzzle wrote it, or a word of "
                    "the config was lost; install that puzzle, or export the child again"
                )

    def check(self) -> None:
        """Raise UserError for NaN or infinity. Reads every weight once."""
        for name in self.shapes():
            self.checkpoint.tensor(name)


@cache
def families() -> dict[str, Family]:
    """All families by model_type, in the order of `MODULES`, whoever imported which first."""
    places = {importlib.import_module(f"puzzle.parents.{name}").__name__: place for place, name in enumerate(MODULES)}
    for name in sorted(FAMILIES, key=lambda name: places.get(FAMILIES[name].structure.__module__, len(places))):
        FAMILIES[name] = FAMILIES.pop(name)
    return FAMILIES


def open_model(source: str | Path) -> HfModel:
    """Open a local Hugging Face directory or, when there is none of that name, a hub id ("org/name").

    Raises UserError for a missing directory or config, an unsupported architecture, or config values that are missing or not
    understood.
    """
    directory = Path(source)
    if not directory.exists() and str(source).count("/") == 1 and not str(source).startswith((".", "/", "~")):
        directory = _download(str(source))
    checkpoint = Checkpoint(directory)
    model_type = str(checkpoint.config.get("model_type"))
    if model_type not in families():
        hint = nearest(model_type, sorted(families()), likeness=0.8)  # gpt2 is no gpt_oss
        known_too = "" if hint.startswith("known") else f" (supported: {', '.join(families())})"
        raise UserError(f"{directory} is a '{model_type}' model, which is not supported; {hint}{known_too}")
    known = families()[model_type]
    config = defaults_of(checkpoint.config, directory)
    if known.prefixes:
        checkpoint.rename(known.prefixes)
    try:
        structure = known.structure(config)
        base = structure.usual if known.base is None else known.base(config)
        _check_all_read(config, checkpoint.config, model_type)
        check_special(config, structure.vocab_size)
        if structure.max_length < 1:
            raise UserError(
                f"config.json gives a context (max_position_embeddings) of {structure.max_length} tokens: correct it"
            )
    except KeyError as error:
        raise UserError(f"{directory}/config.json lacks {error}: download the checkpoint again") from error
    except UserError as error:
        raise UserError(f"{directory}: {error}") from error
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError, ZeroDivisionError) as error:
        raise UserError(
            f"{directory}/config.json has a value that cannot be ({error}): export or download it again"
        ) from error
    if structure.tied and _own_head(checkpoint):
        structure = replace(structure, tied=False)
    known = replace(known, where=_layout(known, structure, checkpoint))
    found = HfModel(source=str(source), checkpoint=checkpoint, family=known, structure=structure, base=base)
    found.check_shapes()
    return found


def _layout(known: Family, structure: Structure, checkpoint: Checkpoint) -> Callable[[int, str, SubBlock, str], Where]:
    """Another layout of the family's whose tensors are all there, else its usual one, which messages then speak of."""
    for where in known.other_layouts:
        places = (where(n, slot, b, name) for n, slot, b in structure for name in b.tensors())
        if all(set(place.names) <= checkpoint.names for place in places):
            return where
    return known.where


def _own_head(checkpoint: Checkpoint) -> bool:
    """Whether the LM head differs from the embedding, whatever the config says: transformers then keeps both."""
    if not {EMBEDDING, HEAD} <= checkpoint.names:
        return False
    return not torch.equal(checkpoint.tensor(EMBEDDING), checkpoint.tensor(HEAD))


def check_special(config: dict[str, Any], vocab_size: int, file: str = "config.json") -> None:
    """Raise UserError for a special token that no row of the embedding is for."""
    for name in SPECIAL:
        value = config.get(name)
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, int) and one >= vocab_size:
                raise UserError(f"{name} = {one} in {file} lies outside vocab_size {vocab_size}: correct it")


class _Noted(dict[str, Any]):
    """A config that knows which of its fields were looked at."""

    def __init__(self, values: dict[str, Any]):
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)


def _check_all_read(config: _Noted, raw: dict[str, Any], model_type: str) -> None:
    """Raise UserError for a field that transformers understands and our family does not, unless it has its default value."""
    if model_type in OWN_CONFIGS:
        return
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    refuse(raw, per_layer_config="layers that differ from the family's")
    usual = CONFIG_MAPPING[model_type]().to_dict()
    for name in set(usual) & set(raw) - config.read - NEUTRAL - set(PreTrainedConfig().to_dict()):
        if config.get(name) != usual[name]:
            raise UserError(
                f"{name} = {config[name]} in config.json is not understood for models of type '{model_type}'"
            )


def structure_of(config: dict[str, Any], directory: Path) -> Structure:
    """What a config.json of one of `families` says. directory: the one that messages name. Raises UserError as `open_model` does."""
    return families()[config["model_type"]].structure(defaults_of(config, directory))


def defaults_of(config: dict[str, Any], directory: Path) -> _Noted:
    """config.json with what transformers' own class for it adds and rewrites: defaults, today's names for yesterday's fields."""
    raw, model_type = {k: v for k, v in config.items() if k not in QUANTISED}, config["model_type"]
    needed = families()[model_type].needed
    if missing := [name for name in needed if name not in raw]:
        raise UserError(f"{directory}/config.json lacks '{missing[0]}': download the checkpoint again")
    layers = raw.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise UserError(f"{directory}/config.json has num_hidden_layers = {layers}, more than any model: correct it")
    if model_type in OWN_CONFIGS:
        return _Noted(_with_floats(raw))
    for name in needed:
        if not isinstance(raw[name], int) or raw[name] < 1:
            raise UserError(f"{directory}/config.json has {name} = {raw[name]!r}, no number above 0: correct it")
    from transformers import CONFIG_MAPPING

    try:
        whole = CONFIG_MAPPING[model_type].from_dict(_with_floats(raw))
    except Exception as error:  # its checks raise many kinds; all mean that transformers cannot open it either
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"transformers cannot read {directory}/config.json ({reason}): mend it") from error
    return _Noted(whole.to_dict())


def _with_floats(value: Any) -> Any:
    """{"__float__": "Infinity"}, as transformers writes it, is a number."""
    if isinstance(value, list):
        return [_with_floats(one) for one in value]
    if not isinstance(value, dict):
        return value
    return float(value["__float__"]) if set(value) == {"__float__"} else {k: _with_floats(v) for k, v in value.items()}


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(hub_id, allow_patterns=["*.safetensors", "*.json", *TOKENIZER_FILES, *LICENCE_FILES])
        )
    except Exception as error:  # the hub client raises many kinds; all mean that there is no such model to read
        raise UserError(
            f"'{hub_id}' is neither a local directory nor a model that the hub gives ({first_line(error)}): "
            "check the spelling, or download it and pass the directory"
        ) from error
