"""The vLLM plug-in (entry-point group `vllm.general_plugins`): `vllm serve CHILD` on the `--format hf` export, as it stands.

vLLM calls `register` in each of its processes. From then on it reads config.json by `ServedConfig` and builds `vllm_model.py`,
both of which come with this package: no code of the checkpoint runs, with or without --trust-remote-code.
"""

from __future__ import annotations

import logging
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.recurrent import Recurrent
from puzzle.blocklib.sub_block import MissingFace
from puzzle.parents.child import DENSE, LISTS, RANK, SIZED
from puzzle.parents.child import child as read_child
from puzzle.parents.names import EMBEDDING, FINAL_NORM, HEAD, hf_name
from puzzle.parents.structure import Structure

logger = logging.getLogger("vllm.puzzle")  # below vLLM's own, whose handlers it has
READ_AGAINST = ((0, 26), (0, 32))  # the oldest and the newest vLLM whose sources the plug-in was read against
ARCHITECTURE, HYBRID = "PuzzleForCausalLM", "PuzzleHybridForCausalLM"  # the other of children with a recurrent kind
# What single layers have of their own, by which vLLM must not judge all of them: it would cut every cache to a window, or stretch the
# context by a RoPE's factor (`max_position_embeddings` has it already).
OF_LAYERS = ("per_layer_config", "sliding_window", "rope", "ropes", "auto_map", *LISTS, DENSE, RANK, *SIZED)
# By vLLM itself.
MAY_CHANGE = ("architectures", "dtype", "quantization_config", "tie_word_embeddings", "transformers_version")


class ServedConfig(PreTrainedConfig):
    """A child's config.json as vLLM should see it. child: config.json itself, from which the layers are built."""

    model_type = "puzzle"
    child: Any = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Raises UserError for a child that is not understood."""
        return super().from_dict(seen_by_engine(config_dict.get("child") or config_dict), **kwargs)

    def structure(self) -> Structure:
        """Raises ValueError for a value that is not config.json's any more: `--hf-overrides` would be half followed."""
        for name, value in seen_by_engine(self.child).items():
            if name in self.child and name not in MAY_CHANGE and getattr(self, name, value) != value:
                raise ValueError(
                    f"{name} {getattr(self, name)} where config.json has {self.child[name]}: a child takes no hf-overrides; edit its "
                    f"config.json"
                )
        return read_child(self.child)


def seen_by_engine(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of config.json that hold for the whole model, and what vLLM derives from the others: the most KV heads of any layer,
    for what is sized once (each layer's cache is sized by its own). Raises MissingFace for a kind that vLLM does not run."""
    structure = read_child(config)
    for _, _, sub_block in structure:
        if sub_block.lacks_in_vllm:
            raise MissingFace(sub_block.kind, sub_block.lacks_in_vllm)
    found = {name: value for name, value in config.items() if name not in OF_LAYERS}
    if states := recurrents(structure):
        kinds = {Gqa: "attention", **dict.fromkeys(map(type, states), "mamba")}
        types = [kinds.get(type(layer["attention"]), "mlp") for layer in structure.layers]
        # A chunk changes no result; kernels take powers of 2.
        chunk = 1 << (max(state.chunk_size for state in states).bit_length() - 1)
        found |= {"architectures": [HYBRID], "layers_block_type": types, "chunk_size": chunk}
    return found | {
        "num_key_value_heads": max(
            [a.num_key_value_heads for a in attentions(structure)] or [config["num_key_value_heads"]]
        ),
        "max_position_embeddings": structure.max_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "child": config,
    }


def attentions(structure: Structure) -> list[Gqa]:
    return [sub_block for _, _, sub_block in structure if isinstance(sub_block, Gqa)]


def recurrents(structure: Structure) -> list[Recurrent]:
    return [sub_block for _, _, sub_block in structure if isinstance(sub_block, Recurrent)]


def wanted_tensors(structure: Structure, tied: bool) -> set[str]:
    """Names of all tensors that a checkpoint of the child has."""
    found = {hf_name(i, slot, sub_block, name) for i, slot, sub_block in structure for name in sub_block.tensors()}
    return found | {EMBEDDING, FINAL_NORM} | (set() if tied else {HEAD})


def missing_tensors(wanted: set[str], seen: set[str]) -> set[str]:
    """What a checkpoint with the tensors `seen` lacks. A quantised matrix may be called weight_packed."""
    return {name for name in wanted - seen if f"{name}_packed" not in seen}


class EngineSettings:
    """What vLLM asks of an architecture before it starts (its `VerifyAndUpdateConfig`)."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Raises ValueError for a vLLM that is too old, or for hf-overrides."""
        from vllm import __version__

        check_version(__version__)
        model_config.hf_config.structure()

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """A child without any attention has no cache, whose prefixes vLLM would look for."""
        if not attentions(vllm_config.model_config.hf_config.structure()):
            vllm_config.cache_config.enable_prefix_caching = False


class HybridSettings(EngineSettings):
    """Of a child with a recurrent kind, whose states vLLM keeps in pages beside those of attention."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Raises ValueError too for a child that vLLM would take for another model."""
        EngineSettings.verify_and_update_model_config(model_config)
        structure = model_config.hf_config.structure()
        states = recurrents(structure)
        if not attentions(structure):
            raise ValueError(
                f"this child has {states[0].kind} and no attention: vLLM pages the states of hybrids alone"
            )
        if len({state.state_dtype for state in states}) > 1:
            raise ValueError("this child's recurrent layers differ in state_dtype: vLLM has one for all")
        if len(kinds := sorted({state.kind for state in states})) > 1:
            raise ValueError(f"this child has {' and '.join(kinds)}: vLLM has one kind of recurrent layer in a model")

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """The recurrent state in the dtype that config.json says, unless the user does."""
        if vllm_config.cache_config.mamba_ssm_cache_dtype == "auto":
            states = recurrents(vllm_config.model_config.hf_config.structure())
            vllm_config.cache_config.mamba_ssm_cache_dtype = states[0].state_dtype


def check_version(version: str) -> tuple[int, int]:
    """(major, minor) of vLLM's version. Raises ValueError for one before READ_AGAINST; one after it is warned of."""
    numbers = version.split(".")[:2]
    found = (int(numbers[0]), int(numbers[1])) if len(numbers) == 2 and "".join(numbers).isdigit() else (0, 0)
    oldest, newest = (".".join(map(str, bound)) for bound in READ_AGAINST)
    if found < READ_AGAINST[0]:
        raise ValueError(
            f"vLLM {version}: puzzle's plug-in serves children in vLLM {oldest} to {newest}: install one of these"
        )
    if found > READ_AGAINST[1]:
        logger.warning(
            "vLLM %s: puzzle's plug-in was read against vLLM %s to %s; `puzzle serve-check CHILD --engine vllm` says whether this one "
            "computes the same",
            version,
            oldest,
            newest,
        )
    return found


def register() -> None:
    """Make children known to this process's transformers and vLLM. May be called again."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    AutoConfig.register(ServedConfig.model_type, ServedConfig, exist_ok=True)
    for name, settings in ((ARCHITECTURE, EngineSettings), (HYBRID, HybridSettings)):
        ModelRegistry.register_model(name, f"puzzle.serving.vllm_model:{name}")
        MODELS_CONFIG_MAP[name] = settings
