"""puzzle: from a parent LLM and a deployment budget to the cheapest child that keeps its behaviour."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# A wheel carries blocklib/, solver/ and kernels/ inside this package; a checkout keeps them beside it.
if (_Path(__file__).parents[1] / "pyproject.toml").is_file():
    __path__.append(str(_Path(__file__).parents[1]))
