"""Put a child together: for every layer the parent's own sub-block or a trained one from the library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from puzzle.base.errors import UserError
from puzzle.base.files import content_hash
from puzzle.blocklib.plain.part import Move, Part, loaded, moved, moving
from puzzle.blocklib.sub_block import SubBlock
from puzzle.blocklib.variant import PARENT
from puzzle.library.manifest import Library, Replacement
from puzzle.library.store import BlockStore
from puzzle.measure.architecture import Architecture, architecture_path, read_architecture
from puzzle.measure.measurable import Measurable, of_checkpoint
from puzzle.parents.opened import HfModel, open_model
from puzzle.parents.structure import Structure
from puzzle.runtime.model import Block, CausalModel, load_model


def is_architecture(path: Path) -> bool:
    """Whether `path` is an architecture.json or the directory of one, and no checkpoint."""
    return architecture_path(path).is_file() and path.suffix != ".gguf" and not (path / "config.json").is_file()


def library_of(path: Path) -> Path:
    """The library that the architecture at `path` was solved from: the one that it lies in, or beside, as `puzzle run` leaves it."""
    for folder in (path.absolute(), *path.absolute().parents):
        for root in (folder, folder / "library"):
            if (root / "library.json").is_file():
                return root
    raise UserError(
        f"{path} is an architecture that lies in no library: pass `library` with the one it was solved from"
    )


def open_child(source: str, library: Path | None = None) -> Measurable:
    """A child to measure: a checkpoint, or an architecture whose blocks come from its library (None: as `library_of` finds it).

    Raises UserError for what is neither, and for an architecture that is not of this library.
    """
    path = Path(source)
    if library is None and not is_architecture(path):
        return of_checkpoint(source)
    opened = Library.open(library or library_of(path))
    solved, parent = architecture_of(path, opened), open_parent(opened, None)
    return Measurable(
        name=source,
        structure=opened.structure.with_layers(solved.sub_blocks),
        tokenizer=parent.directory,
        solved=solved,
        source=LibraryChild(library=opened, layers=solved.variants, parent=parent),
    )


def architecture_of(path: Path, library: Library) -> Architecture:
    """The architecture at `path` (a file or the directory it is in), checked against the library.

    Raises UserError when it belongs to another parent, or names a variant that the library lacks.
    """
    found = read_architecture(path)
    if found.parent_fingerprint != library.fingerprint:
        raise UserError(f"{path} was solved for another parent than that of library {library.root}: solve again")
    if len(found.layers) != library.num_layers:
        raise UserError(f"{path} has {len(found.layers)} layers, the parent {library.num_layers}: solve again")
    for index, (layer, space) in enumerate(zip(found.layers, library.spaces, strict=True)):
        if layer.keys() != space.keys():
            raise UserError(f"{path} layer {index} has other slots than the library's: solve again")
        for slot, choice in layer.items():
            if space[slot].get(choice.variant) != choice.sub_block:
                raise UserError(
                    f"{path} layer {index} asks for {slot} '{choice.variant}', which library {library.root} "
                    "lacks: build it, or solve again"
                )
    return found


def open_parent(library: Library, parent: str | None) -> HfModel:
    """The library's parent. Raises UserError where its fingerprint is not that of the one it was built from."""
    source = library.parent_source(parent)
    opened = open_model(source)
    mine, found = library.fingerprint, opened.checkpoint.fingerprint()
    if found != mine:
        raise UserError(
            f"library {library.root} was built from another parent (fingerprint {mine[:12]}) than {source} "
            f"({found[:12]}): pass the right `parent`, or run `puzzle build-library` with another --out"
        )
    return opened


def read_variant(store: BlockStore, layer: int, slot: str, name: str, sub_block: SubBlock) -> dict[str, Tensor]:
    """The tensors of a trained sub-block from the library, as they are stored. Raises UserError where they are not its own."""
    tensors = store.read(layer, slot, name)
    if {n: tuple(t.shape) for n, t in tensors.items()} != sub_block.tensors():
        raise UserError(
            f"{store.path(layer, slot, name)} holds tensors of another shape than {slot} variant {name}: "
            "delete it and run `puzzle build-library` again"
        )
    return tensors


def read_part(
    store: BlockStore, layer: int, slot: str, name: str, sub_block: SubBlock, move: Move, *, in_training: bool = False
) -> Part:
    """A trained sub-block from the library, ready to run. Raises UserError as `read_variant` does."""
    return loaded(sub_block, moved(sub_block, read_variant(store, layer, slot, name, sub_block), move), in_training)


@dataclass(frozen=True, kw_only=True, slots=True)
class LibraryChild:
    """A child, read from a library and its parent (`runtime.model.Weights`). layers: {slot: variant} each; a slot that is not
    named keeps the parent's."""

    library: Library
    layers: Sequence[Replacement]
    parent: HfModel

    @property
    def structure(self) -> Structure:
        spaces = self.library.spaces
        chosen = [
            {slot: spaces[index][slot][layer.get(slot, PARENT)] for slot in spaces[index]}
            for index, layer in enumerate(self.layers)
        ]
        return self.parent.structure.with_layers(chosen)

    def weights(self, layer: int, slot: str) -> dict[str, Tensor]:
        name = self.layers[layer].get(slot, PARENT)
        if name == PARENT:
            return self.parent.weights(layer, slot)
        sub_block = self.library.spaces[layer][slot][name]
        return read_variant(BlockStore(self.library.root), layer, slot, name, sub_block)

    def fingerprint(self) -> str:
        """Of the parent, and of every block that is not its own."""
        store, chosen = BlockStore(self.library.root), [sorted(layer.items()) for layer in self.layers]
        places = [(n, *one) for n, layer in enumerate(chosen) for one in layer if one[1] != PARENT]
        return content_hash([self.library.fingerprint, [[*place, store.record(*place)["sha256"]] for place in places]])

    def embedding(self) -> Tensor:
        return self.parent.embedding()

    def final_norm(self) -> Tensor:
        return self.parent.final_norm()

    def lm_head(self) -> Tensor:
        return self.parent.lm_head()


def assemble(
    library: Library,
    layers: Sequence[Replacement],
    parent: HfModel,
    *,
    model: CausalModel | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> CausalModel:
    """The child in memory. layers: {slot: variant} each; a slot that is not named keeps the parent's. model: the parent already
    loaded on that device, whose weights the child then shares."""
    source = LibraryChild(library=library, layers=layers, parent=parent)
    if model is None:
        return load_model(source, device=device, dtype=dtype)
    like, store, blocks = model.embedding.weight, BlockStore(library.root), []
    for index, replacement in enumerate(layers):
        parts: dict[str, Part] = model.blocks[index].parts()  # type: ignore[operator]
        for slot, name in replacement.items():
            if name != PARENT:
                sub_block, move = library.spaces[index][slot][name], moving(like.device, like.dtype)
                parts[slot] = read_part(store, index, slot, name, sub_block, move)
        blocks.append(Block(parts))
    head = None if model.head is None else model.head.data
    child = CausalModel(source.structure, like.data, blocks, model.norm.weight.data, head)
    return child.requires_grad_(False).eval()
