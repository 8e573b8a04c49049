"""Several processes build, score and evaluate as one does: same bits, whoever is killed, and one line where one of them fails."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from puzzle.base.lock import holding
from puzzle.base.ranks import Ranks
from puzzle.library.manifest import score_name
from puzzle.library.plan import balanced
from puzzle.library.results import Results, share

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo")

SCORE = ("--sequences", 16, "--device", "cpu")
KILLED = """
import os, signal
from {module} import {owner}
plain, calls = {owner}.{name}, []
def patched(self, *given):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == {call}:
        {action}
    return plain(self, *given)
{owner}.{name} = patched
"""
AT_STEP = {"module": "puzzle.blocklib.distill", "owner": "Recipe", "name": "lr_at", "call": 6}
AT_SCORE = {"module": "puzzle.library.results", "owner": "Results", "name": "put", "call": 8}
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
SNAPSHOTS = (
    "from puzzle.library.build import BuildOptions\nBuildOptions.__init__.__kwdefaults__['snapshot_seconds'] = 0\n"
)
STEPS = """
import os
from puzzle.blocklib.distill import Recipe
plain_lr = Recipe.lr_at
def noted(self, step):
    print(f"at step {step}", flush=True)
    return plain_lr(self, step)
Recipe.lr_at = noted
"""


@pytest.fixture(scope="module")
def build(parent, corpus) -> tuple:
    """Arguments without --out: eight steps of all layers, five variants in each."""
    return (
        "build-library", parent, "--data", corpus, "--tokens", 1024, "--seq-len", 32, "--batch-size", 4, "--attention",
        "kv1,linear", "--ffn", "0.5,linear,none", "--calibration-sequences", 8, "--validation-sequences", 6,
        "--score-sequences", 16, "--device", "cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(puzzle, build, tmp_path_factory) -> Path:
    """By one process."""
    out = tmp_path_factory.mktemp("together") / "whole"
    done = puzzle(*build, "--out", out)
    assert done.exit_code == 0, done.output
    return out


def files(root: Path) -> dict[str, bytes]:
    """Of a library, but for where its parent lies."""
    found = {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
    facts = json.loads(found.pop("library.json"))
    del facts["parent"]["source"]
    return found | {"library.json": json.dumps(facts).encode()}


def errors(group: list) -> list[str]:
    """Lines that any of the processes printed as errors; none of them shows a traceback."""
    told = [process.log.read_text() for process in group]
    assert not any("Traceback" in text for text in told), told
    return [line for text in told for line in text.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(("processes", "more"), [(2, ()), (3, ("--group-size", 1))])
def test_the_same_bits_as_one(launch, ended, build, whole, tmp_path, processes, more):
    """In one round of two groups; and in two rounds, the second of which goes back along the chain and leaves two idle."""
    group = launch((*build, *more, "--out", tmp_path / "lib"), processes=processes)
    assert ended(group) == [0] * processes, [p.log.read_text() for p in group]
    assert files(tmp_path / "lib") == files(whole)
    assert "medians over 4 layers" in " ".join(group[0].log.read_text().split())  # wherever a long path breaks the line
    assert not any("medians" in process.log.read_text() for process in group[1:])


def test_nests_together(launch, ended, puzzle, build, tmp_path):
    """A nest is trained by one process, and goes on as one where a run was killed."""
    command = (*build, "--ffn", "0.75,0.5,0.25", "--nested", "--no-score", "--out")
    command = tuple(x for x in command if x not in ("--score-sequences", 16))  # which belong to scores
    done = puzzle(*command, tmp_path / "alone")
    assert done.exit_code == 0, (done.output, done.exception)
    for setup, ends in ((SNAPSHOTS + KILLED.format(**AT_STEP, action=KILL), [2, -signal.SIGKILL]), ("", [0, 0])):
        group = launch((*command, tmp_path / "lib"), processes=2, setup=setup)
        assert ended(group) == ends, [p.log.read_text() for p in group]
    assert files(tmp_path / "lib") == files(tmp_path / "alone")


@pytest.mark.parametrize("again", [2, 1, 3])
def test_kill_nine_of_one_ends_all_and_any_number_goes_on(launch, ended, build, whole, tmp_path, again):
    command = (*build, "--out", tmp_path / "lib")
    group = launch(command, processes=2, setup=SNAPSHOTS + KILLED.format(**AT_STEP, action=KILL))
    assert ended(group) == [2, -signal.SIGKILL]
    (line,) = errors(group)
    assert "another process of this run has ended" in line
    assert "start all of them again" in line
    assert not (tmp_path / "lib/.lock").exists()
    group = launch(command, processes=again, setup=SNAPSHOTS + STEPS)
    assert ended(group) == [0] * again, [p.log.read_text() for p in group]
    steps = [line for line in group[0].log.read_text().splitlines() if line.startswith("at step")]
    assert steps == ["at step 5", "at step 6", "at step 7"]
    assert files(tmp_path / "lib") == files(whole)


def test_an_error_of_one_is_one_line_and_the_end_of_all(launch, ended, build, tmp_path):
    action = "from puzzle.base.errors import UserError; raise UserError('the second has no `seq_len`')"
    group = launch((*build, "--out", tmp_path / "lib"), processes=2, setup=KILLED.format(**AT_STEP, action=action))
    assert ended(group) == [2, 2]
    assert errors(group) == ["error: the second has no --seq-len"]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("--seq-len", 4096), "4096 is longer than the parent's context"),
        (("--tokens", "few"), "--tokens"),
        (("--no-such-option",), "No such option"),
        (("--data", "/nowhere"), "/nowhere does not exist"),
    ],
)
def test_bad_input_is_told_once(launch, ended, build, tmp_path, arguments, wanted):
    group = launch((*build, *arguments, "--out", tmp_path / "lib"), processes=2)
    assert ended(group) == [2, 2]
    (line,) = errors(group)
    assert wanted in line
    assert not (tmp_path / "lib").exists()


def test_a_directory_that_another_run_has(launch, ended, build, tmp_path):
    with holding(tmp_path / "lib"):
        group = launch((*build, "--out", tmp_path / "lib"), processes=2)
        assert ended(group) == [2, 2]
    (line,) = errors(group)
    assert "is being changed by process" in line


def test_hosts_with_different_parents(launch, ended, build, tmp_path):
    setup = """
import os
from puzzle.parents.checkpoint import Checkpoint
plain = Checkpoint.fingerprint
Checkpoint.fingerprint = lambda self: plain(self) + os.environ["RANK"]
"""
    group = launch((*build, "--out", tmp_path / "lib"), processes=2, setup=setup)
    assert ended(group) == [2, 2]
    (line,) = errors(group)
    assert "process 1 sees another parent" in line


def test_other_arguments_in_one_process(launch, ended, build, tmp_path):
    """A block trained by another recipe would go into the library, or the processes wait for each other."""
    setup = "import os, sys\nsys.argv += ['--lr', f'{1 + int(os.environ[\"RANK\"])}e-3']\n"
    group = launch((*build, "--out", tmp_path / "lib"), processes=2, setup=setup)
    assert ended(group) == [2, 2]
    told = "process 1 was started with '--lr 2e-3' where the first has '--lr 1e-3': start all with the same arguments"
    assert errors(group) == [f"error: {told}"]
    assert not (tmp_path / "lib").exists()


@pytest.mark.parametrize(
    ("verb", "options", "wanted"),
    [
        ("solve", ("--throughput", "2x"), "`puzzle solve` runs in one process"),
        ("profile", ("--gpu", "cpu"), "`puzzle profile` measures in one process: start it without torchrun"),
    ],
)
def test_verbs_that_one_process_does(launch, ended, whole, verb, options, wanted):
    """Two profiles would write the same file."""
    group = launch((verb, whole, *options), processes=2)
    assert ended(group) == [2, 2]
    (line,) = errors(group)
    assert wanted in line
    assert not (whole / "costs").exists()


def test_they_end_at_once(launch, ended, parent, child, corpus):
    """Whatever threads a library has left: gloo's abort now and then in the interpreter's own end, after all is done."""
    setup = "import threading\nthreading.Thread(target=threading.Event().wait).start()\n"
    command = (
        "evaluate",
        parent,
        child,
        "--data",
        corpus,
        "--sequences",
        2,
        "--seq-len",
        16,
        "--no-speed",
        "--device",
        "cpu",
    )
    group = launch((*command, "--json"), processes=2, setup=setup)
    assert ended(group) == [0, 0]
    assert '"kl"' in group[0].log.read_text()


@pytest.mark.parametrize("again", [2, 1])
def test_scores_of_a_killed_process_are_taken_over(launch, ended, whole, corpus, tmp_path, again):
    """Two processes score anew, the second is killed in its second layer: what both had found is not measured again."""
    lib = shutil.copytree(whole, tmp_path / "a" / "lib")
    shutil.rmtree(lib / "scores")
    facts = json.loads((lib / "library.json").read_text())
    parent = (whole / facts["parent"]["source"]).resolve()
    command = ("score", lib, "--data", corpus, "--parent", parent, *SCORE)
    group = launch(command, processes=2, setup=KILLED.format(**AT_SCORE, action=KILL))
    assert ended(group) == [2, -signal.SIGKILL]
    parts = sorted(path.name for path in (lib / "scores").iterdir())
    assert "L00.rank0.json" in parts
    assert any(name.endswith("rank1.json") for name in parts)
    count = "import puzzle.library.results as r\nplain = r.Results.put\nr.Results.put = lambda *a: (print('one'), plain(*a))[1]"
    group = launch(command, processes=again, setup=count)
    assert ended(group) == [0] * again, [p.log.read_text() for p in group]
    assert 0 < sum(p.log.read_text().splitlines().count("one") for p in group) < 20
    assert files(lib) == files(whole)


def test_a_screen_drops_the_same(launch, ended, puzzle, whole, corpus, parent, tmp_path):
    """The first process estimates, for all; what is left is split, over more processes than one pass has variants."""
    libs = [shutil.copytree(whole, tmp_path / name / "lib") for name in ("alone", "together")]
    for lib in libs:
        shutil.rmtree(lib / "scores")
    commands = [("score", lib, "--data", corpus, "--parent", parent, *SCORE, "--sub-block-screen", 0.5) for lib in libs]
    assert puzzle(*commands[0]).exit_code == 0
    group = launch(commands[1], processes=2)
    assert ended(group) == [0, 0], [p.log.read_text() for p in group]
    assert files(libs[0]) == files(libs[1])
    assert "10 of 20 blocks are screened out" in group[0].log.read_text()


def test_dry_runs_together(launch, ended, build, whole, parent, child, corpus, tmp_path):
    """Every verb that several processes do: the first tells the plan, nothing is written."""
    before = files(whole)
    heal = ("--teacher", parent, "--tokens", 64, "--seq-len", 16, "--batch-size", 4)
    verbs = (
        (*build, "--out", tmp_path / "lib"),
        ("score", whole, "--data", corpus, "--parent", parent, "--joint", *SCORE),
        ("evaluate", parent, child, "--data", corpus, "--seq-len", 32, *SCORE),
        ("heal", child, "--data", corpus, *heal, "--device", "cpu", "--out", tmp_path / "healed"),
    )
    for command in verbs:
        group = launch((*command, "--dry-run", "--json"), processes=2)
        assert ended(group) == [0, 0], [p.log.read_text() for p in group]
        told = group[0].log.read_text()
        facts = json.loads(told[told.index("{") :])
        assert facts.get("processes", 2) == 2
        assert not group[1].log.read_text()
    assert files(whole) == before
    assert not (tmp_path / "lib").exists()
    assert not (tmp_path / "healed").exists()


def test_evaluate_together(launch, ended, puzzle, parent, child, corpus):
    command = ("evaluate", parent, child, "--data", corpus, "--no-speed", "--seq-len", 32, *SCORE, "--json")
    alone = json.loads(puzzle(*command).stdout)
    group = launch(command, processes=2)
    assert ended(group) == [0, 0], [p.log.read_text() for p in group]
    told = group[0].log.read_text()
    assert json.loads(told[told.index("\n{") :]) == alone
    assert alone["num_tokens"] == 16 * 32
    assert not group[1].log.read_text()


@pytest.mark.parametrize("world", [1, 2, 3, 8, 100])
def test_every_replacement_is_scored_once(world):
    wanted = {layer: [{"ffn": name} for name in ("0.5", "0.25", "none")] for layer in range(6)}
    costs = {layer: 10.0 - layer for layer in range(6)}
    shares = []
    for rank in range(world):
        shares.append(share(wanted, costs, Ranks(rank=rank, world=world, device=torch.device("cpu"))))
    found = [(layer, score_name(one)) for mine in shares for layer, names in mine.items() for one in names]
    assert found == [(layer, score_name(one)) for layer in wanted for one in wanted[layer]]
    loads = [sum(costs[layer] * len(names) for layer, names in mine.items()) for mine in shares]
    assert max(loads) <= sum(loads) / world + 10


def test_scores_on_other_text_go_first(tmp_path):
    """Of all layers, and what processes left; what was measured on the same text is kept."""
    alone, wanted = Ranks(device=torch.device("cpu")), {0: [{"ffn": "none"}], 1: [{"ffn": "none"}]}
    for layer in range(3):
        results = Results(tmp_path, {layer: [{"ffn": "none"}]}, [layer], str, alone)
        results.put(layer, "ffn/none", {"kl": float(layer)})
    shutil.copy(tmp_path / "scores/L01.json", tmp_path / "scores/L01.rank1.json")
    key = {0: "0", 1: "other", 2: "other"}
    results = Results(tmp_path, wanted, range(3), key.__getitem__, alone)
    assert len(list((tmp_path / "scores").iterdir())) == 4  # to look changes nothing
    results.remove_others()
    assert [path.name for path in (tmp_path / "scores").iterdir()] == ["L00.json"]
    assert results.missing(screening=False) == {1: [{"ffn": "none"}]}


@pytest.mark.parametrize(
    ("costs", "count", "most", "wanted"),
    [
        ([1] * 6, 2, 6, [3, 3]),
        ([1] * 7, 3, 3, [3, 2, 2]),
        ([9, 1, 1, 1], 2, 4, [1, 3]),
        ([9, 1, 1, 1], 2, 2, [2, 2]),
        ([1, 2, 3], 3, 1, [1, 1, 1]),
    ],
)
def test_groups_of_equal_cost(costs, count, most, wanted):
    found = balanced(costs, count, most)
    assert sorted(b - a for a, b in found) == sorted(wanted)
    assert [a for a, _ in found] == [0, *(b for _, b in found[:-1])]
    assert found[-1][1] == len(costs)
