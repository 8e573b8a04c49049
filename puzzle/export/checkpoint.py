"""Write a Hugging Face checkpoint: tensors streamed one by one, and all files or none under the final name."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puzzle.base.errors import UserError, writing
from puzzle.base.files import claim_output, file_hash, json_text, read_json, write_json
from puzzle.data.tokenizer import tokenizer_files
from puzzle.parents.checkpoint import LICENCE_FILES

MODELING_FILE = Path(__file__).with_name("modeling_puzzle.py")
# What it imports, whatever the child has.
KINDS_FILES = tuple(sorted(MODELING_FILE.parent.glob("modeling_puzzle_*.py")))
# Of formats with code of their own, which runs ours.
DECILM_CODE, HYBRID_CODE = (
    (
        *(MODELING_FILE.with_name(f"{part}_{name}.py") for part in ("configuration", "modeling")),
        MODELING_FILE,
        *KINDS_FILES,
    )
    for name in ("decilm", "nemotron_h_puzzle")
)
SHIPPED_CODE = tuple(path.name for path in dict.fromkeys((*DECILM_CODE, *HYBRID_CODE)))
HEADER_BYTES = 256 * 1024  # kept free for a shard's header: about 2,000 tensors
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def write_checkpoint(
    out: Path,
    *,
    config: dict[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer_from: Path | None,
    generation_config: dict[str, Any] | None,
    card: str,
    extra_json: Mapping[str, dict[str, Any]] | None = None,
    code: Sequence[Path] | None = None,
    max_shard_bytes: int = 4 * 2**30,
    force: bool = False,
) -> dict[str, Any]:
    """Write a child to the directory `out` and return its manifest {"schema": 1, "files": {name: {bytes, sha256}}}.

    tensors: (name, tensor) in any order and on any device; one is held at a time.
    tokenizer_from: the directory whose files of tokenizer and licence are copied.
    extra_json: further files, {"name.json": content}.
    code: Python files that config.json's auto_map names, and what they import. Default: MODELING_FILE and KINDS_FILES.
    max_shard_bytes: of tensor data in one safetensors file; a larger tensor gets a file of its own. [bytes]
    force: replace a directory that is not empty.

    Everything is written to a temporary directory beside `out`, which is renamed at the end: a failure removes it and
    leaves `out` as it was, and what a killed export left there is removed. Raises UserError when `out` is in use
    (without force) or cannot be written, when the disk is full, and when `tokenizer_from` is missing.
    """
    if tokenizer_from is not None and not tokenizer_from.is_dir():
        raise UserError(f"tokenizer directory {tokenizer_from} does not exist: give the parent's directory")
    documents = {"config.json": config, "generation_config.json": generation_config}
    if clash := {*documents, "manifest.json", "model.safetensors.index.json"} & set(extra_json or ()):
        raise ValueError(f"extra_json may not replace {sorted(clash)}")
    with publishing(out, force, [tokenizer_from]) as temporary:
        _write_shards(temporary, tensors, max_shard_bytes, out)
        with writing(out):
            for name, content in {**documents, **(extra_json or {})}.items():
                if content is not None:
                    _write_json(temporary / name, content)
            (temporary / "README.md").write_text(card, encoding="utf-8")
            for source in (MODELING_FILE, *KINDS_FILES) if code is None else code:
                shutil.copyfile(source, temporary / source.name)
            copy_companions(tokenizer_from, temporary)
    return read_json(out / "manifest.json", "puzzle export")


def copy_companions(source: Path | None, target: Path) -> None:
    """Copy the files of tokenizer and licence that a checkpoint has beside its weights."""
    if source is None:
        return
    licences = (path for pattern in LICENCE_FILES for path in source.glob(pattern))
    for path in (*tokenizer_files(source), *licences):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def outdated_code(directory: Path) -> str | None:
    """One line when a child carries model code that is not this puzzle's, which transformers may outgrow; else None."""
    pairs = [(directory / name, MODELING_FILE.with_name(name)) for name in SHIPPED_CODE]
    other = [theirs.name for theirs, ours in pairs if theirs.is_file() and theirs.read_bytes() != ours.read_bytes()]
    if not other:
        return None
    return (
        f"{directory} carries model code of another puzzle ({', '.join(other)}), and text that transformers generates "
        f"with it may be wrong: `puzzle export {directory} --out NEW` writes today's"
    )


@contextlib.contextmanager
def publishing(out: Path, force: bool, reads: Iterable[str | Path | None] = ()) -> Iterator[Path]:
    """Give a temporary directory beside `out`; when the block ends well, list it in a manifest and rename it to `out`.

    When the block fails it is removed and `out` stays as it was; what a killed process left there is removed first.
    Raises UserError when `out` is in use (without force), holds what is read or cannot be written.
    """
    target = out.resolve()  # through a symbolic link: the directory behind it is replaced
    with writing(out):
        clear_leftovers(target)
    claim_output(out, force, reads)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        with writing(out):
            shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process of the same number
            temporary.mkdir(parents=True)
        yield temporary
        with writing(out):
            files = {
                str(path.relative_to(temporary)): {"bytes": path.stat().st_size, "sha256": file_hash(path)}
                for path in sorted(temporary.rglob("*"))
                if path.is_file()
            }
            write_json(temporary / "manifest.json", {"files": files})
            _publish(temporary, target, force)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def clear_leftovers(target: Path) -> None:
    """Remove what exports to `target` left beside it when they were killed; those still running are left alone.

    One killed between the two renames of a replacement had moved the old directory aside: it comes back.
    """
    if not target.parent.is_dir():
        return
    for kind in ("old", "tmp"):
        for path in target.parent.glob(f"{glob.escape(f'.{target.name}.{kind}-')}*"):
            owner = path.name.rpartition("-")[2]
            if not owner.isdecimal() or _is_running(int(owner)):
                continue
            if kind == "old" and not target.exists():
                os.rename(path, target)
            elif path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return True


def _publish(temporary: Path, out: Path, force: bool) -> None:
    """Rename `temporary` to `out`; with force an old `out` is moved aside first, and back if that fails."""
    if not (force and out.exists()):
        os.rename(temporary, out)
        return
    old = out.with_name(f".{out.name}.old-{os.getpid()}")
    os.rename(out, old)
    try:
        os.rename(temporary, out)
    except BaseException:
        os.rename(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json_text(content) + "\n", encoding="utf-8")


def _write_shards(directory: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int, out: Path) -> None:
    """model.safetensors, or model-0000i-of-0000n.safetensors with their index. out: the name for error messages."""
    shards: list[_Shard] = []
    weight_map: dict[str, int] = {}
    try:
        for name, tensor in tensors:
            if name in weight_map:
                raise ValueError(f"two tensors are called {name}")
            with writing(out):
                if not shards or not shards[-1].fits(name, tensor, max_shard_bytes):
                    if shards:
                        shards[-1].close()
                    shards.append(_Shard(directory / f"{len(shards)}.part"))
                shards[-1].add(name, tensor)
            weight_map[name] = len(shards)
        if not shards:
            raise ValueError("no tensors to write")
        with writing(out):
            shards[-1].close()
    finally:
        for shard in shards:
            with contextlib.suppress(OSError):
                shard.handle.close()

    def file_name(number: int) -> str:
        return "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"

    with writing(out):
        for number, shard in enumerate(shards, start=1):
            shard.path.rename(directory / file_name(number))
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(shard.num_bytes for shard in shards)},
                "weight_map": {name: file_name(number) for name, number in weight_map.items()},
            }
            _write_json(directory / "model.safetensors.index.json", index)


class _Shard:
    """One safetensors file, written tensor by tensor: the header's place stays free until `close` fills it.

    Format: header length (8 bytes), JSON header padded with spaces, then the data without gaps
    (https://github.com/huggingface/safetensors#format).
    """

    def __init__(self, path: Path):
        self.path = path
        self.header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self.num_bytes = 0
        self.num_header_bytes = len(json.dumps(self.header, allow_nan=False))
        self.handle = open(path, "wb")  # noqa: SIM115
        self.handle.seek(8 + HEADER_BYTES)

    def entry(self, tensor: Tensor) -> dict[str, Any]:
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"safetensors has no name for {tensor.dtype}")
        end = self.num_bytes + tensor.nbytes
        return {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [self.num_bytes, end]}

    def fits(self, name: str, tensor: Tensor, max_bytes: int) -> bool:
        """Whether data, header and alignment (an offset is a multiple of the item size) allow this tensor too."""
        header = self.num_header_bytes + len(json.dumps({name: self.entry(tensor)}, allow_nan=False))
        aligned = self.num_bytes % tensor.element_size() == 0
        return aligned and self.num_bytes + tensor.nbytes <= max_bytes and header <= HEADER_BYTES

    def add(self, name: str, tensor: Tensor) -> None:
        entry = self.entry(tensor)
        self.header[name] = entry
        self.num_header_bytes += len(json.dumps({name: entry}, allow_nan=False))
        self.num_bytes += tensor.nbytes
        self.handle.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    def close(self) -> None:
        self.handle.seek(0)
        self.handle.write(
            HEADER_BYTES.to_bytes(8, "little") + json.dumps(self.header, allow_nan=False).encode().ljust(HEADER_BYTES)
        )
        self.handle.close()
