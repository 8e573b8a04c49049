"""sft.py of examples/post_training/: what it counts, a few steps on the tiny child, stopped and gone on."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from example_scripts import PROMPTS, module, run, write_rows
from puzzle.base.errors import UserError
from puzzle.parents.grown import new_tensors
from puzzle.runtime.model import load_model

for package in ("trl", "peft", "datasets"):
    pytest.importorskip(package, reason=f"needs {package}: pip install 'puzzle-nas[train]'")

pytestmark = pytest.mark.usefixtures("scripts")


def test_a_chat_gets_the_prompt_of_its_mode():
    with_mode = module("sft").with_mode
    question = {"role": "user", "content": "why?"}
    thinks, plain = ({"role": "assistant", "content": c} for c in ("<think>x</think>y", "y"))
    assert with_mode([question, thinks], "")[0] == {"role": "system", "content": "detailed thinking on"}
    own = {"role": "system", "content": "Be brief."}
    assert with_mode([own, question, plain], "")[0]["content"] == "detailed thinking off\n\nBe brief."
    assert with_mode([own, question, plain], "")[1:] == [question, plain]
    said = {"role": "system", "content": "detailed thinking off"}
    assert with_mode([said, question, plain], "")[0] == said
    for chat in ([said, question, thinks], [question, thinks, question, plain], [question]):
        with pytest.raises(UserError, match=r"row 1: (the system prompt says|all answers of a chat think)"):
            with_mode(chat, "row 1")


def sft_files(folder: Path) -> Path:
    """Two stages of two blends."""
    chats = [
        [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}] for r in PROMPTS
    ]
    thoughts = [[c[0], {"role": "assistant", "content": f"<think>sum</think>{c[1]['content']}"}] for c in chats]
    for name, rows in (("plain", chats), ("thinks", thoughts)):
        write_rows(folder / f"{name}.jsonl", [{"messages": chat} for chat in rows])
    sources = [
        {"path": f"{name}.jsonl", "weight": w, "messages": "messages", "max_epochs": 2}
        for name, w in (("plain", 0.25), ("thinks", 0.75))
    ]
    (folder / "blend.yaml").write_text(yaml.safe_dump({"sources": sources}))
    stage = {"blend": "blend.yaml", "tokens": 600, "max_length": 128, "batch_size": 2, "lr": 1e-3}
    stages = {"stages": [{"name": "first", **stage}, {"name": "second", **stage, "tokens": 300}]}
    (folder / "stages.yaml").write_text(yaml.safe_dump(stages))
    return folder / "stages.yaml"


@pytest.mark.parametrize("lora", [(), ("--lora", 4)], ids=["all", "lora"])
def test_sft_runs(mixed, tmp_path, lora, one_line_error):
    stages = sft_files(tmp_path)
    done = run("sft", stages, "--child", mixed, "--out", tmp_path / "out", *lora)
    assert "thinks.jsonl: 9 chats; 0 are longer" in done.output
    norms = [load_model(path).norm.weight for path in (mixed, tmp_path / "out/first", tmp_path / "out/second")]
    assert torch.equal(norms[0], norms[1]) == bool(lora)
    first, second = (
        load_model(tmp_path / "out" / name).blocks[1].attention.q_proj.weight for name in ("first", "second")
    )
    assert not torch.equal(first, second)
    again = run("sft", stages, "--child", mixed, "--out", tmp_path / "out", *lora)
    assert again.output.count("is there already") == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["first", "second"]
    other = (stages, "--child", mixed, "--out", tmp_path / "out", *lora, "--seed", 1)
    one_line_error(
        CliRunner().invoke(module("sft").main, [str(a) for a in other]), "out/first was made with another seed"
    )


@pytest.mark.parametrize("lora", [(), ("--lora", 4)], ids=["all", "lora"])
def test_sft_that_stopped_goes_on(mixed, tmp_path, one_line_error, monkeypatch, lora):
    """In the middle of its second stage, and once that was saved: the same bits as of a run that was left alone."""
    sft, stages = module("sft"), sft_files(tmp_path)
    stages.write_text(stages.read_text().replace("batch_size: 2", "batch_size: 1"))
    asked = [str(a) for a in (stages, "--child", mixed, "--save-every", 1, *lora, "--out")]
    run("sft", *asked, tmp_path / "whole")
    out, part = tmp_path / "out", tmp_path / "out/.second.part"
    for name, left in (("training_step", "checkpoint-1"), ("save_model", "checkpoint-3")):
        plain = getattr(sft.SFTTrainer, name)

        def stopped(self, *given, plain=plain, name=name, **named):
            here = ".second.part" in self.args.output_dir and self.state.global_step
            if here and (name == "training_step" or given[0].endswith("whole")):
                raise KeyboardInterrupt
            return plain(self, *given, **named)

        with monkeypatch.context() as patch:
            patch.setattr(sft.SFTTrainer, name, stopped)
            assert CliRunner().invoke(sft.main, [*asked, str(out)]).exit_code == 1
        assert [path.name for path in part.glob("checkpoint-*")] == [left]
    done = CliRunner().invoke(sft.main, [*asked, str(out), "--seed", "1"])
    one_line_error(done, "out/first was made with another seed")
    shutil.copytree(out, tmp_path / "other")
    stages.write_text(stages.read_text().replace("tokens: 300", "tokens: 200"))
    done = CliRunner().invoke(sft.main, [*asked, str(tmp_path / "other")])
    one_line_error(done, "other/second, which is not finished, was made with another stage: give another `out`")
    stages.write_text(stages.read_text().replace("tokens: 200", "tokens: 300"))
    assert f"going on from {part / left}" in run("sft", *asked, out).output
    assert sorted(path.name for path in out.iterdir()) == ["first", "second"]
    first, second = (load_file(path / "second/model.safetensors") for path in (tmp_path / "whole", out))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_sft_trains_new_experts_alone(mixed, puzzle, tmp_path, one_line_error):
    """Through both stages, whatever checkpointing of activations does; the old stays to the bit."""
    stages, grown = sft_files(tmp_path), tmp_path / "grown"
    assert puzzle("grow", mixed, "--experts", 2, "--width", 16, "--out", grown).exit_code == 0
    run("sft", stages, "--child", grown, "--out", tmp_path / "out", "--new-only")
    before, after = (load_file(path / "model.safetensors") for path in (grown, tmp_path / "out/second"))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name].to(tensor.dtype))}
    fixed = {name for name in new_tensors(grown) if name.endswith("correction_bias")}
    assert changed == new_tensors(grown) - fixed
    asked = ("--child", mixed, "--out", tmp_path / "x", "--new-only")
    one_line_error(
        CliRunner().invoke(module("sft").main, [str(a) for a in (stages, *asked)]),
        "`new_only` needs a --child of `puzzle grow`",
    )


def test_sft_draws_by_weight_and_loses_no_mask(mixed, tmp_path):
    sft, data = module("sft"), importlib.import_module("puzzle.data.blend")
    sft_files(tmp_path)
    tokenizer = importlib.import_module("puzzle.data.tokenizer").load_tokenizer(mixed)
    sources = data.read_blend(tmp_path / "blend.yaml")
    pools = [sft.chats(source, tokenizer, 128) for source in sources]
    counted = [i for i, m in zip(pools[0][0]["input_ids"], pools[0][0]["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(counted) == "0<|endoftext|>"
    rows = list(sft.draw(sources, pools, 600, 0))
    shares = [sum(len(r["input_ids"]) for r in rows if r in pool) for pool in pools]
    assert shares[0] / sum(shares) == pytest.approx(0.25, abs=0.05)
    with pytest.raises(UserError, match=r"source 'thinks.jsonl' would be read more often than its max_epochs 2"):
        list(sft.draw(sources, pools, 10_000, 0))
