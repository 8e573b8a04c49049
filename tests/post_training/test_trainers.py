"""A heterogeneous child in TRL's trainers as it was exported: it learns, is saved, opens again everywhere, and generates."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from puzzle.base.errors import UserError
from puzzle.runtime.model import load_model

trl = pytest.importorskip("trl", reason="needs trl: pip install 'puzzle-nas[train]'")
peft = pytest.importorskip("peft", reason="needs peft: pip install 'puzzle-nas[train]'")
datasets = pytest.importorskip("datasets", reason="needs datasets: pip install 'puzzle-nas[train]'")

COMMON = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "gradient_checkpointing": True,
    "use_cpu": True,
    "trust_remote_code": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
}
SUMS = [(f"{a} + {b} =", f" {a + b}", f" {a * b + 100}") for a in range(4) for b in range(4)]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "linear_attn", "linear_mlp"]


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)


def chats(right: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": right}]


def sft(**options):
    rows = [{"messages": [{"role": "user", "content": q}, *chats(a)]} for q, a, _ in SUMS]
    config = trl.SFTConfig(**COMMON | {"assistant_only_loss": True, "max_length": 64} | options)
    return trl.SFTTrainer, config, rows, {}


def dpo(**options):
    rows = [{"prompt": q, "chosen": a, "rejected": b} for q, a, b in SUMS]
    return trl.DPOTrainer, trl.DPOConfig(**COMMON | {"max_length": 64} | options), rows, {}


def grpo(**options):
    rows = [{"prompt": q, "answer": a} for q, a, _ in SUMS]
    sampled = {"num_generations": 2, "max_completion_length": 8, "beta": 0.1}
    config = trl.GRPOConfig(**COMMON | sampled | options)
    reward = {"reward_funcs": lambda completions, **_: [float(len(set(c))) for c in completions]}
    return trl.GRPOTrainer, config, rows, reward


@pytest.fixture
def train(mixed, tmp_path):
    def run(make, lora, child=mixed, **options):
        kind, config, rows, more = make(output_dir=str(tmp_path / "run"), **options)
        if lora:
            more["peft_config"] = peft.LoraConfig(r=4, target_modules=lora, task_type="CAUSAL_LM")
        trainer = kind(model=str(child), args=config, train_dataset=datasets.Dataset.from_list(rows), **more)
        trainer.train()
        return trainer

    return run


@pytest.mark.parametrize("lora", [None, TARGETS, "all-linear"], ids=["all", "lora", "all-linear"])
@pytest.mark.parametrize("make", [sft, dpo, grpo])
def test_it_trains_is_saved_and_opens_again(make, lora, mixed, train, tmp_path):
    trainer = train(make, lora)
    norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    assert len(norms) == 2
    assert min(norms) > 0
    model = trainer.model
    if lora:
        adapted = {name.rpartition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
        linear = {f"base_model.model.{n}" for n, m in load(mixed).named_modules() if isinstance(m, torch.nn.Linear)}
        assert adapted == linear - {"base_model.model.lm_head"}
        trainer.save_model(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(load(mixed), tmp_path / "adapter")
        ids = torch.arange(24).view(2, 12)
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)
        with pytest.raises(UserError, match="holds a LoRA adapter: merge it"):
            load_model(tmp_path / "adapter")
        model = model.merge_and_unload()
        model.save_pretrained(tmp_path / "saved")
    else:
        trainer.save_model(tmp_path / "saved")
    check_saved(model.eval(), tmp_path / "saved", mixed)


def check_saved(model, saved, before):
    """transformers and our runtime give the logits of the model in memory, which have moved, and it generates with its cache."""
    ids = torch.randint(2, 384, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(ids).logits
        assert torch.equal(load(saved)(ids).logits, wanted)
        torch.testing.assert_close(load_model(saved)(ids), wanted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(load(before)(ids).logits, wanted, rtol=1e-3, atol=1e-3)
    again = load(saved)
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    assert torch.equal(again.generate(ids, **options), again.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("name", ["granite", "gemma3", "biases"])
def test_the_loss_is_the_models_own(name, scaled, train):
    """TRL computes it from hidden states and head: multipliers of either are in it, windows and several RoPEs beside packing too."""
    child = scaled(name)
    for options in ({"per_device_train_batch_size": len(SUMS)}, {"packing": True, "max_length": 512}):
        trainer = train(sft, None, child=child, **options)
        batch = next(iter(trainer.get_train_dataloader()))
        with torch.no_grad():
            wanted = load(child)(**{k: v for k, v in batch.items() if k != "seq_lengths"}).loss
        assert trainer.state.log_history[0]["loss"] == pytest.approx(float(wanted), rel=1e-4)


def test_packing_gives_the_loss_of_padded_rows(train, mixed):
    """All chats in one row without padding, and all in a batch of their own rows: the same tokens count, with the same loss."""
    packed = train(sft, None, packing=True, max_length=2048)
    padded = train(sft, None, per_device_train_batch_size=len(SUMS))
    batch = next(iter(packed.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1
    assert "attention_mask" not in batch
    first, second = (t.state.log_history[0] for t in (packed, padded))
    assert first["loss"] == pytest.approx(second["loss"], abs=2e-4)
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-3)
