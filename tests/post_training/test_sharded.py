"""FSDP2 over two processes: layers with few weights or none are wrapped as accelerate wraps them, and gradients are those of one."""

from __future__ import annotations

SCRIPT = """if True:
    import sys, torch, torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    dist.init_process_group("gloo")
    whole, shards = (AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True) for _ in range(2))
    shards.train().gradient_checkpointing_enable()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for module in shards.modules():
        if type(module).__name__ in shards._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(shards, mesh=mesh)
    ids = torch.arange(2, 42).view(2, 20)
    for model in (whole, shards):
        model(input_ids=ids, labels=ids).loss.backward()
    for (name, mine), theirs in zip(shards.named_parameters(), whole.parameters()):
        torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad, msg=name)
    print(sum(type(module).__name__.startswith("FSDP") for module in shards.modules()))
"""


def test_every_layer_is_a_shard(mixed, torchrun, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    for code, out, error in torchrun(2, "-c", SCRIPT, mixed):
        assert code == 0, error
        assert out.strip() == "8"  # seven layers and the model
