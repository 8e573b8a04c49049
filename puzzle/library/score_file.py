"""scores/LNN.json of one layer while it is being filled: written anew, whole, after every score, so that a killed run loses little.

{"key": content, "scores": {name: {"kl", …}}, "estimates": {name: nats per token}, "screened": [names]}; the last two only where variants
were screened (`puzzle.library.screen`). What was measured on other data or blocks is removed before anything is measured: it does not
add up with what comes.
"""

from __future__ import annotations

from puzzle.base.files import content_hash, read_json, write_json
from puzzle.blocklib.variant import PARENT
from puzzle.library.manifest import Library, scores_path
from puzzle.library.store import BlockStore


class ScoreFile:
    """scores: by name (`score_name`); estimates: of the screen; screened: names that it dropped, which have no score."""

    def __init__(self, library: Library, layer: int, data_hash: str, device: str):
        self.path, store = scores_path(library.root, layer), BlockStore(library.root)
        hashes = {
            slot: {name: store.record(layer, slot, name)["sha256"] for name in space if name != PARENT}
            for slot, space in library.spaces[layer].items()
        }
        self.key = content_hash([library.fingerprint, data_hash, hashes, device])
        old = read_json(self.path, "puzzle score") if self.path.is_file() else {}
        same = old if old.get("key") == self.key else {}
        self.stale = bool(old) and not same
        self.scores: dict[str, dict[str, float]] = same.get("scores", {})
        self.estimates: dict[str, float] = same.get("estimates", {})
        self.screened: set[str] = set(same.get("screened", ()))

    def put(self, name: str, score: dict[str, float]) -> None:
        """And write the file."""
        self.scores[name] = score
        self.screened.discard(name)
        self.write()

    def write(self) -> None:
        more = {"estimates": self.estimates, "screened": sorted(self.screened)} if self.estimates else {}
        write_json(self.path, {"key": self.key, "scores": self.scores, **more})
