"""The text that the reference parent was trained on, as one .jsonl: what examples/train_parent.py gathers, in the order of hashes.

python benchmarks/lib/reference_corpus.py FILE.jsonl [MAX_FILES]
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def write_corpus(path: Path, max_files: int | None) -> int:
    """The texts as one .jsonl in the order of their hashes. Returns how many."""
    spec = importlib.util.spec_from_file_location("train_parent", ROOT / "examples" / "train_parent.py")
    assert spec is not None
    assert spec.loader is not None
    train_parent = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train_parent)
    files, _ = train_parent.corpus_files()
    train, held_out = train_parent.read_documents(files[:max_files])
    texts = sorted([*train, *held_out], key=train_parent.text_key)
    with open(path, "w", encoding="utf-8") as handle:
        handle.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return len(texts)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    print(write_corpus(Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else None), "files")
