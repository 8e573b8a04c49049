"""Read single tensors of a Hugging Face checkpoint: safetensors only, nothing is executed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from puzzle.base.errors import UserError
from puzzle.base.files import parse_json
from puzzle.base.finite import all_finite
from puzzle.kernels.fp8 import from_fp8
from puzzle.parents import mxfp4
from puzzle.parents.fp8 import Fp8, fp8_of

LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
SAMPLE_BYTES = 4096


class Checkpoint:
    """A directory with config.json and safetensors, tensors read one by one. fp8: how its quantised weights are stored, if any are so; mxfp4: whether
    its experts are in MXFP4.

    Raises UserError when the directory, its config or its weights are missing or broken, or quantised in a way that is not read.
    """

    fp8: Fp8 | None
    mxfp4: bool

    def __init__(self, directory: Path):
        self.directory = directory
        if not directory.is_dir():
            wrong = "is a file" if directory.is_file() else "does not exist"
            raise UserError(f"model directory {directory} {wrong}: give a local directory or a hub id")
        if (directory / "adapter_config.json").is_file():
            raise UserError(
                f"{directory} holds a LoRA adapter: merge it into its model with peft's merge_and_unload(), and give the directory "
                "that save_pretrained then writes"
            )
        self.config = self.read("config.json")
        try:
            self.mxfp4 = mxfp4.is_mxfp4(self.config)
            self.fp8 = None if self.mxfp4 else fp8_of(self.config)
        except UserError as error:
            raise UserError(f"{directory}: {error}") from error
        index, path = directory / "model.safetensors.index.json", directory / "model.safetensors"
        if index.is_file():
            self._files = {name: directory / file for name, file in self.read(index.name).get("weight_map", {}).items()}
        elif path.is_file():
            self._files = {name: path for name in read_header(path) if name != "__metadata__"}
        else:
            raise UserError(
                f"{directory} has no model.safetensors: only safetensors weights are read; convert other formats with "
                "transformers' save_pretrained"
            )
        self._stored = {name: name for name in self._files}
        missing = sorted({f.name for f in self._files.values() if not f.is_file()})
        if missing:
            raise UserError(f"{directory} lacks {missing[0]}, which its index names: download the checkpoint again")

    @property
    def quantised(self) -> str | None:
        """What its weights are stored in, "fp8" or "MXFP4"; None where they are whole."""
        return "MXFP4" if self.mxfp4 else None if self.fp8 is None else "fp8"

    def rename(self, prefixes: Mapping[str, str]) -> None:
        """From now on, call tensors whose stored names begin with one of these as it says; the first that fits."""
        found = {}
        for stored in self._stored.values():
            old = next((prefix for prefix in prefixes if stored.startswith(prefix)), "")
            found[prefixes.get(old, "") + stored.removeprefix(old)] = stored
        self._files = {name: self._files[stored] for name, stored in found.items()}
        self._stored = found

    def read(self, name: str) -> dict[str, Any]:
        """One of its JSON files. Raises UserError when it is missing, or no object."""
        path = self.directory / name
        try:
            text = path.read_text(encoding="utf-8")
            value = parse_json(text, parse_constant=lambda name: {"__float__": name})  # as transformers writes infinity
        except FileNotFoundError:
            raise UserError(f"{self.directory} has no {name}: is it a Hugging Face checkpoint?") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is not valid JSON ({error}): download the checkpoint again") from error
        if not isinstance(value, dict):
            raise UserError(f"{path} holds {type(value).__name__}, not an object: download the checkpoint again")
        return value

    def stored(self, name: str) -> str:
        """What the files call a tensor."""
        return self._stored[name]

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def entries(self) -> dict[str, dict[str, Any]]:
        """What the headers say of every tensor by name: "shape", and "dtype" as safetensors calls it ("BF16")."""
        stored: dict[str, dict[str, Any]] = {}
        for path in sorted(set(self._files.values())):
            stored |= read_header(path)
        return {name: stored[own] for name, own in self._stored.items() if own in stored}

    def tensor(self, name: str, rows: tuple[int, int] | None = None, dim: int = 0) -> Tensor:
        """One tensor on the CPU, or its rows from begin to end along `dim`; one in fp8 in float32, one in MXFP4 in bf16, times its scales. Raises UserError when it
        is missing, unreadable, or holds NaN or infinity.

        The file is opened anew: one kept open stays mapped, each page that was read counts as resident until it is closed, and
        a pass over a 16 GB checkpoint would end with 16 GB resident.
        """
        with self._opened(name) as handle:
            whole = handle.get_slice(self._stored[name])
            part = () if rows is None else (*[slice(None)] * dim, slice(*rows))
            value = whole[part] if part else handle.get_tensor(self._stored[name])
            shape = whole.get_shape()
        if value.dtype == torch.float8_e4m3fn:
            value = self._dequantised(name, value, shape[0], 0 if rows is None else rows[0])
        elif self.mxfp4 and name.endswith(mxfp4.BLOCKS):
            with self._opened(scales := mxfp4.scales_of(name)) as handle:
                value = mxfp4.dequantised(value, handle.get_tensor(self._stored[scales]))
        return self._finite(name, value)

    def stacked(self, names: Sequence[str]) -> Tensor:
        """Several tensors of one shape along a new first dimension. Each file is opened once: experts are tensors by the thousand."""
        if self.fp8 is not None or not self._files.keys() >= set(names):
            return torch.stack([self.tensor(name) for name in names])
        found: dict[str, Tensor] = {}
        for path in sorted({self._files[name] for name in names}):
            mine = [name for name in names if self._files[name] == path]
            with self._opened(mine[0]) as handle:
                found |= {name: self._finite(name, handle.get_tensor(self._stored[name])) for name in mine}
        return torch.stack([found[name] for name in names])

    def _finite(self, name: str, value: Tensor) -> Tensor:
        if all_finite(value):
            return value
        bad, path = int((~torch.isfinite(value)).sum()), self._files[name]
        raise UserError(f"weight {name} in {path} has {bad} NaN or infinite values: the checkpoint is damaged")

    def _dequantised(self, name: str, weight: Tensor, num_rows: int, first: int) -> Tensor:
        """weight: rows of a stored one of `num_rows`, from `first`."""
        if self.fp8 is None:
            raise UserError(f"weight {name} in {self.directory} is in fp8, and config.json has no quantization_config")
        with self._opened(scale := self.fp8.scale_of(name)) as handle:
            table, block = self.fp8.as_table(handle.get_tensor(self._stored[scale]), num_rows)
        return from_fp8(weight, table, block, first)

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor, without reading it. Raises UserError when it is missing."""
        with self._opened(name) as handle:
            part = handle.get_slice(self._stored[name])
            return part[:1].dtype if part.get_shape() else handle.get_tensor(self._stored[name]).dtype

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        """The file that holds one tensor."""
        if name not in self._files:
            raise UserError(f"{self.directory} lacks the weight {name}: download or export the checkpoint again")
        try:
            with safe_open(self._files[name], framework="pt") as handle:
                yield handle
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._files[name]} cannot be read ({error}): download the checkpoint again") from error

    def fingerprint(self) -> str:
        """sha256 of the config and, for every tensor, its name, dtype, shape and first and last 4 KiB.

        Reading whole weights would take minutes for a large parent; training moves every weight of every tensor, so
        these samples tell two checkpoints of one shape apart.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True, allow_nan=False).encode())
        for path in sorted(set(self._files.values())):
            header = read_header(path)
            with open(path, "rb") as handle:
                base = 8 + struct.unpack("<Q", handle.read(8))[0]
                for name in sorted(n for n in header if n != "__metadata__"):
                    entry = header[name]
                    begin, end = entry["data_offsets"]
                    digest.update(json.dumps([name, entry["dtype"], entry["shape"]], allow_nan=False).encode())
                    for start in (begin, max(begin, end - SAMPLE_BYTES)):
                        handle.seek(base + start)
                        digest.update(handle.read(min(SAMPLE_BYTES, end - start)))
        return digest.hexdigest()


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file. Raises UserError when the file is cut short or not one."""
    try:
        with open(path, "rb") as handle:
            length = struct.unpack("<Q", handle.read(8))[0]
            header = parse_json(handle.read(length))
        end = max((e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"), default=0)
        if path.stat().st_size != 8 + length + end:
            raise ValueError(f"{path.stat().st_size} bytes instead of {8 + length + end}")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError, struct.error) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): download or build it again") from error
    return header
