"""Replace-one-block scores: what each variant alone costs in an otherwise intact parent.

The parent's residual stream is carried forward one layer at a time, so a variant of layer i runs layers i … L only
(Puzzle, arXiv 2411.19146, section 4.1).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from puzzle.base.console import progress
from puzzle.base.device import compute_dtype, pick_device
from puzzle.base.errors import UserError
from puzzle.base.files import content_hash, read_json, write_json
from puzzle.blocklib.layer import KINDS, Kind
from puzzle.blocklib.modules import NoOp
from puzzle.blocklib.variant import PARENT, parse_variant
from puzzle.data.packing import load_tokens
from puzzle.library.manifest import Library
from puzzle.library.store import BlockStore
from puzzle.parents.family import HfModel, open_model
from puzzle.runtime.divergence import Divergence
from puzzle.runtime.model import CausalModel, load_model


def load_variant(
    store: BlockStore, parent: HfModel, layer: int, kind: Kind, name: str, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """A trained sub-block from the library, ready to run."""
    with torch.device("meta"):
        module = parse_variant(kind, name, parent.spec).empty(parent.spec)
    tensors = store.read(layer, kind, name)
    wanted = {n: tuple(t.shape) for n, t in module.state_dict().items()}
    if {n: tuple(t.shape) for n, t in tensors.items()} != wanted:
        raise UserError(
            f"{store.path(layer, kind, name)} holds tensors of another shape than {kind} variant {name}: "
            "delete it and run `puzzle build-library` again"
        )
    module.load_state_dict({n: t.to(device, dtype) for n, t in tensors.items()}, assign=True)
    return module.requires_grad_(False).eval()


class Scorer:
    """Scores the blocks of one library against its parent on held-out sequences [S, T]."""

    def __init__(self, library: Library, parent: HfModel, sequences: Tensor, device: torch.device, batch_size: int):
        self.library, self.parent, self.device = library, parent, device
        self.store = BlockStore(library.root)
        self.dtype = compute_dtype(device)
        self.model: CausalModel = load_model(parent, device=device, dtype=self.dtype)
        self.batches = [ids.long().to(device) for ids in sequences.split(batch_size)]
        self.rope = self.model.rope(sequences.shape[1])

    @torch.no_grad()
    def run(self, data_hash: str, joint: bool) -> None:
        """Fill scores/LNN.json for every layer; layers already scored on the same data and blocks are kept."""
        streams = [self.model.embedding(ids) for ids in self.batches]
        finals = [self.model.hidden(ids) for ids in self.batches]
        todo = {layer: self._wanted(layer, joint) for layer in self.library.layers}
        with progress("score", sum(len(w) for w in todo.values())) as bar:
            for layer, block in enumerate(self.model.blocks):
                if layer in todo:
                    self._score_layer(layer, todo[layer], streams, finals, data_hash, bar)
                streams = [block(x, self.rope) for x in streams]

    def _wanted(self, layer: int, joint: bool) -> list[str]:
        """ "kind/variant" names, and "attention/a+ffn/f" for joint blocks."""
        names = {k: [f"{k}/{v}" for v in self.library.variants(k) if v != PARENT] for k in KINDS}
        pairs = [f"{a}+{f}" for a in names["attention"] for f in names["ffn"]] if joint else []
        return [*names["attention"], *names["ffn"], *pairs]

    def _score_layer(self, layer: int, wanted: list[str], streams, finals, data_hash: str, bar) -> None:
        path = self.store.scores_path(layer)
        keys = {
            k: [self.store.record(layer, k, v)["sha256"] for v in self.library.variants(k) if v != PARENT]
            for k in KINDS
        }
        key = content_hash([self.library.facts["parent"]["fingerprint"], data_hash, keys, str(self.device.type)])
        found: dict[str, dict[str, float]] = {}
        if path.is_file():
            old = read_json(path, "puzzle score")
            found = old["scores"] if old.get("key") == key else {}
        modules: dict[str, nn.Module] = {}
        for name in wanted:
            if name not in found:
                bar.note(f"layer {layer} {name}")
                found[name] = self._score(layer, name, modules, streams, finals)
            bar.advance()
        write_json(path, {"key": key, "scores": found})

    def _score(self, layer: int, name: str, modules: dict[str, nn.Module], streams, finals) -> dict[str, float]:
        block = self.model.blocks[layer]
        parts: dict[str, nn.Module] = {kind: getattr(block, kind) for kind in KINDS}
        for piece in name.split("+"):
            kind, _, variant = piece.partition("/")
            if piece not in modules:
                modules[piece] = load_variant(self.store, self.parent, layer, kind, variant, self.device, self.dtype)  # type: ignore[arg-type]
            parts[kind] = modules[piece]
        meter = Divergence()
        for ids, x, final in zip(self.batches, streams, finals, strict=True):
            for kind in KINDS:
                if not isinstance(parts[kind], NoOp):
                    x = x + parts[kind](x, self.rope)
            for later in self.model.blocks[layer + 1 :]:
                x = later(x, self.rope)
            meter.add(self.model, final, self.model, x, ids)
        result = meter.result()
        if not math.isfinite(result["kl"]):
            raise UserError(
                f"layer {layer} {name} makes the model's output NaN: its training diverged; delete "
                f"{self.store.path(layer, 'attention', 'x').parent.parent} and build with a smaller --lr"
            )
        return result


def score_library(
    root: Path,
    data: list[str],
    *,
    parent: str | None = None,
    num_sequences: int = 64,
    seq_len: int | None = None,
    batch_size: int = 8,
    joint: bool = False,
    text_field: str = "text",
    device: str = "auto",
) -> Path:
    """Score every block of the library on held-out documents. Returns the directory of the scores."""
    library = Library.open(root)
    source = library.parent_source(parent)
    opened = open_model(source)
    library.check_parent(opened.checkpoint.fingerprint(), source)
    tokens = load_tokens(
        data,
        opened.directory,
        seq_len=seq_len or library.facts["data"]["seq_len"],
        num_train=1,
        num_validation=num_sequences,
        text_field=text_field,
        seed=library.facts["seed"],
    )
    scorer = Scorer(library, opened, tokens.validation, pick_device(device), batch_size)
    scorer.run(tokens.hash, joint)
    return root / "scores"
