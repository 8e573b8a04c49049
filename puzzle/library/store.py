"""The library on disk: one safetensors file and one JSON record per trained variant, verified when read.

LIB/library.json                           (puzzle.library.manifest)
LIB/blocks/L07/attention/kv2.safetensors   trained tensors; the sub-block's key stands in the header's metadata
LIB/blocks/L07/attention/kv2.json          status, tokens, losses, hash
LIB/scores/L07.json                        {"attention/kv2": {...}}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from puzzle.base.errors import UserError
from puzzle.base.files import file_hash, read_json, replacing, write_json
from puzzle.base.units import layer_name


class BlockStore:
    """Reads and writes the trained blocks of one library directory."""

    def __init__(self, root: Path):
        self.root = root

    def layer(self, layer: int) -> Path:
        """The directory of one layer's blocks."""
        return self.root / "blocks" / layer_name(layer)

    def path(self, layer: int, slot: str, variant: str) -> Path:
        """Of the tensors."""
        return self.layer(layer) / slot / f"{variant}.safetensors"

    def record_path(self, layer: int, slot: str, variant: str) -> Path:
        """Of the record beside them, with which a block exists."""
        return self.path(layer, slot, variant).with_suffix(".json")

    def has(self, layer: int, slot: str, variant: str, key: str) -> bool:
        """True when this very block (same content key) is complete and whole on disk.

        A file that does not match its record is treated as missing: it will be trained again.
        """
        path = self.path(layer, slot, variant)
        try:
            found = self.record(layer, slot, variant)
        except UserError:
            return False
        return path.is_file() and found.get("key") == key and found.get("sha256") == file_hash(path)

    def write(
        self, layer: int, slot: str, variant: str, tensors: dict[str, Tensor], spec: dict[str, Any], record: dict
    ) -> None:
        """The tensors first, the record last: a block exists when its record does.

        record: must hold "key", the content key; its "sha256" is added here.
        """
        path = self.path(layer, slot, variant)
        # One key only: safetensors writes several in random order, and equal blocks must be equal files.
        metadata = {"puzzle": json.dumps({**spec, "key": record["key"]}, sort_keys=True, allow_nan=False)}
        with replacing(path) as temporary:
            save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, temporary, metadata)
        write_json(self.record_path(layer, slot, variant), {**record, "sha256": file_hash(path)})

    def read(self, layer: int, slot: str, variant: str) -> dict[str, Tensor]:
        """The block's tensors. Raises UserError when missing, cut short, or not what was written."""
        path = self.path(layer, slot, variant)
        record = self.record(layer, slot, variant)
        if not path.is_file():
            raise UserError(
                f"{path} is missing: run `puzzle build-library` again with --out {self.root}, it fills the gap"
            )
        if file_hash(path) != record["sha256"]:
            raise UserError(
                f"{path} was truncated or changed after it was trained (its sha256 is not the recorded "
                f"one): delete it and run `puzzle build-library` again with --out {self.root}"
            )
        try:
            with safe_open(path, framework="pt") as handle:
                return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise UserError(f"{path} is not a safetensors file ({error}): delete it and build again") from error

    def record(self, layer: int, slot: str, variant: str) -> dict[str, Any]:
        return read_json(self.record_path(layer, slot, variant), "puzzle build-library")
