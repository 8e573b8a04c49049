"""dependency.json: how much each layer's contribution depends on each earlier layer. Needs no torch.

{"schema": 1, "model": "child", "num_tokens": 8192, "data_hash": "…", "device": "cpu", "versions": "torch …",
 "layers": {"dependency": [[null, 0.02, …], …], "relative_error": [[null, 0.05, …], …]}, "ffns": null or the same}

Row i, column j > i. With c_j what j adds to the residual stream of a token, and c_j⁻ⁱ the same when i adds nothing:
    dependency     = mean over tokens of 1 - cos(c_j, c_j⁻ⁱ)                     (arXiv 2503.18908, section 3.2)
    relative_error = Σ ‖c_j⁻ⁱ - c_j‖² / Σ ‖c_j‖²
"layers" are whole layers, attention and FFN; "ffns" are FFNs alone. null: not defined, or one of them adds nothing at all.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from puzzle.base.errors import UserError, writing
from puzzle.base.files import read_json, replacing

Rows = list[list[float | None]]
MADE_BY = "puzzle fuse MODEL --data TEXT --dependency-only --out FILE.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """Both measures, [L][L] each."""

    dependency: Rows
    relative_error: Rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Dependency:
    """What dependency.json holds. facts: everything but the matrices."""

    layers: Matrix | None
    ffns: Matrix | None
    facts: dict[str, Any]

    @property
    def num_layers(self) -> int:
        matrix = self.layers or self.ffns
        assert matrix is not None, "one of them was measured"
        return len(matrix.dependency)

    def to_json(self) -> dict[str, Any]:
        return {**self.facts, "layers": _plain(self.layers), "ffns": _plain(self.ffns)}


def _plain(matrix: Matrix | None) -> dict[str, Rows] | None:
    return None if matrix is None else {name: _rounded(rows) for name, rows in asdict(matrix).items()}


def _rounded(rows: Rows) -> Rows:
    return [[None if value is None else float(f"{value:.6g}") for value in row] for row in rows]


def read_dependency(path: Path, num_layers: int) -> Dependency:
    """Raises UserError for a file that is none, or one of a model with another number of layers."""
    value = read_json(path, MADE_BY)
    found = dict.fromkeys(("layers", "ffns"))
    for name in found:
        if (raw := value.pop(name, None)) is None:
            continue
        try:
            found[name] = Matrix(**{field.name: _rows(raw[field.name]) for field in fields(Matrix)})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} holds no dependency matrix in '{name}' ({error}): make it with `{MADE_BY}`"
            ) from error
    if not any(found.values()):
        raise UserError(f"{path} holds no dependency matrix: make it with `{MADE_BY}`")
    value.pop("schema")
    dependency = Dependency(**found, facts=value)
    if dependency.num_layers != num_layers:
        raise UserError(
            f"{path} is of a model with {dependency.num_layers} layers, this one has {num_layers}: measure it again with "
            f"`{MADE_BY}`"
        )
    return dependency


def _rows(raw: Any) -> Rows:
    rows = [[None if value is None else float(value) for value in row] for row in raw]
    if any(len(row) != len(rows) for row in rows):
        raise ValueError("it is not square")
    return rows


def check_matplotlib() -> None:
    """Raise UserError where no picture can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise UserError(
            "`heat_map` needs the package matplotlib: pip install 'puzzle-nas[report]', or leave it out"
        ) from None


def draw_heat_map(path: Path, matrix: Matrix, title: str) -> None:
    """The dependency as a PNG: row i is the layer left out, column j the layer whose contribution changes."""
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [[float("nan") if value is None else value for value in row] for row in matrix.dependency]
    size = max(4.0, 0.22 * len(rows) + 2)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(rows, cmap="viridis", vmin=0)
    figure.colorbar(image, label="1 - cos of what j adds, with and without i", shrink=0.8)
    axes.set(title=title, xlabel="layer j", ylabel="layer i, left out")
    with writing(path), replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
