"""`puzzle report`: one page of what is there, with what is not there said; nothing from a file is ever markup."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from puzzle.page.page import SECTIONS, write_page
from puzzle.page.svg import Axis, Series, apart, chart

SCRIPT = "<script>alert(1)</script>\ud800"
VOID = {"meta", "br"}
TASKS = {
    "device": "cpu",
    "tasks": {
        "gsm8k": {
            "documents": 10,
            "metrics": {"exact_match": {"parent": {"mean": 0.5, "low": 0.25, "high": 0.75}, "child": {"mean": 0.25, "low": None, "high": None}}},
            "differences": {"exact_match": {"child - parent": {"mean": -0.25, "low": -0.5, "high": 0.0}}},
        },
        "own": {"accuracy": 0.125, "ok": True},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory, puzzle, parent, corpus) -> Path:
    """A run of every stage, and what `bench`, `solve --pareto`, `solve --finalists` and `evaluate --tasks` leave beside it."""
    root = tmp_path_factory.mktemp("page") / "run"
    recipe = {
        "parent": str(parent),
        "data": str(corpus),
        "device": "cpu",
        "build": {
            "attention": "kv1,none", "ffn": "0.5,none", "tokens": 1280, "seq_len": 32, "batch_size": 4,
            "validation_sequences": 1, "calibration_sequences": 8,
        },
        "score": {"sequences": 4},
        "profile": {"gpu": "cpu", "batches": [1, 2], "seconds": 0.005, "rounds": 1},
        "goal": {"throughput": "1.2x"},
        "workload": {"input_len": 8, "output_len": 8},
        "heal": {"tokens": 1024, "seq_len": 32, "batch_size": 4, "validation_sequences": 4, "eval_every": 2},
        "evaluate": {"sequences": 4, "repeats": 1, "prompts": ["import os"]},
    }  # fmt: skip
    (root.parent / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    commands = [
        ("run", root.parent / "recipe.yaml", "--out", root),
        ("bench", root / "solution", "--gpu", "cpu", "--with-parent", "--repeats", 1, "--json"),
        ("solve", root / "library", "--gpu", "cpu", "--pareto", "throughput", "--points", 4, "--out", root / "frontier",
         "--input-len", 8, "--output-len", 8),
        ("solve", root / "library", "--gpu", "cpu", "--throughput", "1.2x", "--input-len", 8, "--output-len", 8, "--finalists", 3, "--data", corpus, "--sequences", 2,
         "--out", root / "measured"),
    ]  # fmt: skip
    for command in commands:
        done = puzzle(*command)
        assert done.exit_code == 0, (done.output, done.exception)
        if command[0] == "bench":
            (root / "bench.json").write_text(done.stdout)
    (root / "tasks.json").write_text(json.dumps(TASKS))
    return root


@pytest.fixture
def own(ran, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(ran, tmp_path / "run", ignore=shutil.ignore_patterns("*.safetensors")))


class Checked(HTMLParser):
    """Every tag is closed by its own; nothing is fetched or run."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.heads: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "img", "iframe", "object", "base", "form", "a")
        assert not {name for name, _ in attrs if name in ("src", "href") or name.startswith("on")}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in ("path", "circle", "rect")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["h2"]:
            self.heads.append(data)


def check_drawn(html: str) -> int:
    """Every SVG is well-formed, inside its box, without NaN, and no two texts lie on each other. Returns how many there are."""
    drawn = re.findall(r"<svg .*?</svg>", html, re.DOTALL)
    for one in drawn:
        tree = ElementTree.fromstring(one)
        _, _, width, height = map(float, tree.get("viewBox").split())
        boxes = []
        for part in tree.iter():
            for name in ("x", "y", "cx", "cy", "width", "height", "d"):
                values = [float(v) for v in re.findall(r"-?\d+\.?\d*|nan|inf", part.get(name) or "")]
                assert all(math.isfinite(v) and -1 <= v <= max(width, height) + 1 for v in values), (
                    ElementTree.tostring(part)
                )
            if part.tag == "text" and "rotate" not in part.get("transform", ""):
                wide, x = 6.4 * len(part.text), float(part.get("x"))
                left = x - wide * {"start": 0, "middle": 0.5, "end": 1}[part.get("text-anchor")]
                boxes.append((left, float(part.get("y")), wide, part.text))
        for n, (left, y, _, words) in enumerate(boxes):
            for other, at, wide, told in boxes[:n]:
                apart_ = left >= other + wide or other >= left + len(words) * 6.4 or abs(y - at) >= 10
                assert apart_, f"{words!r} lies on {told!r}"
    return len(drawn)


def test_all_of_it(puzzle, own):
    done = puzzle("report", own, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    made = json.loads(done.stdout)
    html = (own / "report.html").read_text()
    assert made["bytes"] == len(html.encode()) < 2_000_000
    assert made["missing"] == {}
    assert made["found"]["architecture"][0] == "solution/architecture.json"
    assert Checked(html).heads == [title for title, _, _ in SECTIONS]
    assert "http" not in html.replace("http-equiv", "")
    assert check_drawn(html) == 8  # architecture, frontier, finalists, scores, two slots, two of healing
    for words in ("class=\"predicted\"", "class=\"measured\"", "prefers-color-scheme", "Ringed: chosen", "0.5 [0.25, 0.75]",
                  "by bench, bench.json", "by run, result.json", "goal throughput"):  # fmt: skip
        assert words in html, words
    assert "Not measured or not there" not in html
    assert not list(own.glob(".*.tmp"))


def test_losses_on_the_way_are_kept_and_drawn(ran):
    record = json.loads((ran / "library" / "blocks" / "L01" / "ffn" / "0.5.json").read_text())
    curve = record["validation_curve"]
    assert curve["num_tokens"] == [0, 256, 512, 768, 1024, 1280]
    assert len(curve["losses"]) == 6
    assert record["num_tokens"] == 1280
    assert (curve["losses"][0], curve["losses"][-1]) == (
        record["validation_loss_before"],
        record["validation_loss_after"],
    )


def test_a_library_alone(puzzle, library, tmp_path):
    """Says what is not there, and how to make it."""
    own = Path(shutil.copytree(library, tmp_path / "a library"))
    out = tmp_path / "new" / "page.html"
    done = puzzle("report", own, "--out", out)
    assert done.exit_code == 0, (done.output, done.exception)
    html = out.read_text()
    check_drawn(html)
    Checked(html)
    for words in ("puzzle solve &#x27;", "puzzle heal CHILD", "--pareto throughput", "--tasks NAMES"):
        assert words in html
    assert not (own / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bench.json", "{"),
        ("bench.json", '{"schema": 1, "device": "cpu"}'),
        ("bench.json", "[]"),
        ("evaluate.json", '{"child": {"kl": "far"}, "parent": {}, "device": "cpu", "precision": "bf16"}'),
        ("result.json", '{"schema": 1}'),
        ("tasks.json", '{"tasks": [1]}'),
        ("tasks.json", "[" * 100_000),
        *(("tasks.json", json.dumps({"tasks": {"a": {"documents": 3, "metrics": {"acc": {"child": one}}, "differences": {}}}}))
          for one in ({"mean": math.nan, "low": None, "high": None}, {"mean": 1, "low": 0, "high": math.inf}, math.nan)),
        *(("measured/finalists.json", json.dumps({"best": best, "children": [{"sum_of_scores": 1.0, "kl": kl}, {"sum_of_scores": 2.0, "kl": 1.0}]}))
          for best, kl in ((-1, 1.0), (0.0, 1.0), (0, math.nan), (0, math.inf))),
        ("recipe.json", "\x00"),
        ("frontier/frontier.csv", "value,batch\n1,2\n"),
        ("frontier/frontier.json", "nothing"),
        ("measured/finalists.json", '{"best": 7, "children": []}'),
        ("healed/heal.jsonl", '{"step": 1}\n'),
        ("healed/heal.json", '{"before": {}}'),
        ("solution/architecture.json", '{"schema": 2}'),
        ("library/library.json", '{"schema": 2}'),
        ("library/scores/L01.json", '{"schema": 1, "scores": {"ffn/0.5": {"kl": NaN, "kl_stderr": 0}}}'),
        ("library/scores/L01.json", '{"schema": 1, "scores": {"ffn/0.5": {"kl": null}}}'),
        ("library/blocks/L01/ffn/0.5.json", "{}"),
        ("library/costs/cpu/tiny.csv", "versions,device,date\n1\n"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named(puzzle, one_line_error, own, name, text):
    """And the page that is there stays."""
    (own / "report.html").write_text("before")
    (own / name).write_text(text)
    one_line_error(puzzle("report", own), str(own / name))
    assert (own / "report.html").read_text() == "before"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: [p / "none"], "holds nothing to report"),
        (lambda p: [p], "holds nothing to report"),
        (lambda p: [p, "--out", p / "page.txt"], "holds nothing to report"),
    ],
)
def test_nothing_to_report(puzzle, one_line_error, tmp_path, make, words):
    one_line_error(puzzle("report", *make(tmp_path)), words)


def test_out_is_a_page(puzzle, one_line_error, own):
    one_line_error(puzzle("report", own, "--out", own / "library" / "library.json"), "--out", "ends with .html")
    (own / "a.html").mkdir()
    one_line_error(puzzle("report", own, "--out", own / "a.html"), "--out", "ends with .html")


def test_of_two_parents(puzzle, one_line_error, own):
    path = own / "solution" / "architecture.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"parent_fingerprint": "another"}))
    one_line_error(puzzle("report", own), "different parents", str(path))


def test_what_files_say_is_no_markup(own):
    """Names, recipes, tasks, devices, prompts and paths."""

    def edit(name: str, change) -> None:
        value = json.loads((own / name).read_text())
        change(value)
        (own / name).write_text(json.dumps(value))

    edit("library/library.json", lambda v: v["parent"].update(name=SCRIPT) or v["data"].update(sources=SCRIPT))
    edit(
        "result.json",
        lambda v: (
            v.update(device=SCRIPT) or v["continuations"]["texts"][0].update(prompt=SCRIPT, child=SCRIPT, parent=SCRIPT)
        ),
    )
    edit("tasks.json", lambda v: v["tasks"].update({SCRIPT: {SCRIPT: SCRIPT}}))
    edit("recipe.json", lambda v: v.update({SCRIPT: SCRIPT, "parent": '"><img src=x onerror=alert(1)>'}))
    edit("bench.json", lambda v: v.update(precision='" onload="alert(1)'))
    (own / "bench.json").rename(own / "bench<b>.json")
    write_page(own)
    html = (own / "report.html").read_text()
    Checked(html)
    assert "&lt;script&gt;" in html
    assert "<script" not in html
    assert "<b>.json" not in html


def test_what_was_not_measured_is_not_told_as_measured(own):
    """A run whose speed is an engine's to measure has the batch that was predicted."""
    value = json.loads((own / "result.json").read_text())
    value["measured"] |= {"speedup": None, "tokens_per_second": None, "memory_bytes": None}
    value["child"]["batch"] = 987_654
    (own / "result.json").write_text(json.dumps(value))
    write_page(own)
    html = (own / "report.html").read_text()
    assert "987,654" not in html
    assert "no speed" in html


def test_what_was_promised_for_another_machine_is_not_held_against_it(own):
    write_page(own)
    before = (own / "report.html").read_text()
    value = json.loads((own / "result.json").read_text())
    (own / "result.json").write_text(json.dumps(value | {"device": "another"}))
    write_page(own)
    ratios = [len(re.findall(r"×[^<]* \(\d+\.\d{3}\)", html)) for html in (before, (own / "report.html").read_text())]
    assert ratios == [2, 1]  # of run and bench


def test_many_layers_stay_small(synthetic, tmp_path):
    """126 layers."""
    made = write_page(synthetic("llama-3.1-405b"), tmp_path / "page.html")
    assert made["bytes"] < 2_000_000
    html = (tmp_path / "page.html").read_text()
    check_drawn(html)
    assert "Synthetic, measured by nobody" in html
    assert "Measured: KL" not in html


@pytest.mark.parametrize("heights", [[], [5.0], [5.0, 5.0, 5.0], [100.0, 99.0, 98.0], [0.0] * 30])
def test_labels_are_pushed_apart(heights):
    placed = sorted(apart(heights, 15, 0, 100))
    gap = min(15, 100 / max(1, len(heights) - 1))
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(placed))
    assert all(-1e-9 <= one <= 100 + 1e-9 for one in placed)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[1.0], [3e-7, 8.0], [0.1, 0.11], [1e9, 3e9], [5.0, 5.0]])
def test_axes_have_ticks(values, log):
    axis = Axis.over(values, log)
    assert 2 <= len(axis.ticks()) <= 12
    assert all(0 <= axis.at(value) <= 1 for value in (*values, *axis.ticks()))


def test_what_cannot_be_drawn_is_counted():
    points = [(0.0, 1.0), (1.0, 0.0), (2.0, math.nan), (3.0, math.inf), (4.0, 2.0)]
    assert "3 values are not finite" in chart("t", "x", "y", [Series("a", points)], log_y=True)
    assert check_drawn(chart("t", "x", "y", [Series("a", [])])) == 1
