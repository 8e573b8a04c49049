"""library.json: what a block library holds, readable without torch.

{"parent": {...}, "model": {...}, "data": {...}, "recipe": {...}, "layers": [0, 1, ...],
 "variants": {"attention": {"kv2": {"num_parameters", "kv_elements_per_token", "window", "shape", "hf"}}, "ffn": {...}}}
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puzzle.base.errors import UserError
from puzzle.base.files import read_json

PARENT = "parent"
KINDS = ("attention", "ffn")


@dataclass(frozen=True, slots=True)
class Library:
    """One library directory, its library.json already read."""

    root: Path
    facts: dict[str, Any]

    @classmethod
    def open(cls, root: Path) -> Library:
        """Raises UserError when `root` is no library."""
        if not root.is_dir():
            raise UserError(f"library {root} does not exist: make it with `puzzle build-library PARENT --out {root}`")
        return cls(root, read_json(root / "library.json", "puzzle build-library"))

    @property
    def num_layers(self) -> int:
        return self.facts["model"]["num_layers"]

    @property
    def layers(self) -> list[int]:
        """The layers that have alternatives; the others keep the parent's block."""
        return self.facts["layers"]

    def variants(self, kind: str) -> list[str]:
        return list(self.facts["variants"][kind])

    def variant(self, kind: str, name: str) -> dict[str, Any]:
        return self.facts["variants"][kind][name]

    def scores(self, layer: int) -> dict[str, dict[str, float]]:
        """{"attention/kv2": {"kl", "kl_stderr", "lm_loss", "top1_agreement", "num_tokens"}} of one layer.

        Raises UserError when the layer has not been scored.
        """
        path = self.root / "scores" / f"L{layer:02d}.json"
        return read_json(path, f"puzzle score {self.root}")["scores"]

    def parent_source(self, override: str | None = None) -> str:
        """Where the parent is: as given by --parent, or as recorded (a hub id, or a path relative to the library)."""
        if override is not None:
            return override
        recorded = self.facts["parent"]
        if recorded["relative"]:
            path = Path(os.path.normpath(self.root.absolute() / recorded["source"]))
            if not path.is_dir():
                raise UserError(f"the library's parent is not at {path} any more: pass --parent with its directory")
            return str(path)
        return recorded["source"]

    def check_parent(self, fingerprint: str, source: str) -> None:
        """Raise UserError unless `fingerprint` is that of the parent the library was built from."""
        mine = self.facts["parent"]["fingerprint"]
        if fingerprint != mine:
            raise UserError(
                f"library {self.root} was built from another parent (fingerprint {mine[:12]}) than {source} "
                f"({fingerprint[:12]}): pass the right --parent, or build a new library with another --out"
            )
