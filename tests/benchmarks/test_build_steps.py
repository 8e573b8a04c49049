"""What the benchmark of building says of a step: FLOPs that it must do, changes turned off one by one, time by class of kernel."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from build_changes import OFF, one_by_one, without
from puzzle.blocklib.distill import Recipe, Shown, VariantTrainer
from puzzle.blocklib.plain.part import loaded
from puzzle.blocklib.sub_block import ParentBlock, parse_key
from puzzle.blocklib.variant import search_spaces, variant_of
from puzzle.library.plan import training_flops
from puzzle.parents.known import known_structure
from step_profile import kernel_class, product_kinds, seconds_by_class, traced

H, F, N, D, T = 4096, 14336, 32, 128, 2048


def test_flops_of_a_token_and_layer_of_llama_8b():
    """By hand: what is multiplied forward, what gives weights' gradients, and what gives gradients of o_proj's and down_proj's input."""
    structure = known_structure("llama-3.1-8b")
    (space,) = search_spaces({0: structure.layers[0]}, {"attention": None, "ffn": None}).values()
    attentions = [2 * H * H + 2 * kv * D * H for kv in (4, 2, 1, 8)]  # the last one has a window
    widths = [10752, 7168, 3584, 1536]
    matrices = sum(attentions) + 3 * H * sum(widths) + 2 * H * H
    mixing = 4 * N * D * (3 * (T + 1) / 2 + 128)
    parent = 2 * (2 * H * H + 2 * 8 * D * H + 3 * H * F) + 4 * N * D * (T + 1) / 2
    wanted = parent + 4 * matrices + 2 * (4 * H * H + H * sum(widths)) + 3 * mixing
    assert training_flops(structure.layers[0], space, T, nested=False) == wanted
    assert wanted == pytest.approx(2.80e9, rel=2e-3)
    nested = wanted - 3 * H * 4 * sum(widths[1:]) - 2 * H * sum(widths[1:])
    assert training_flops(structure.layers[0], space, T, nested=True) == nested


def test_mfu(load_script):
    module = load_script("speed/bench_build_8b.py")
    tokens_per_second = 20e6 / 3600
    assert module.mfu(tokens_per_second, 32 * 2.8e9, 989e12) == pytest.approx(0.503, abs=1e-3)


def test_changes_are_turned_on_one_by_one():
    found = list(one_by_one(["window"]))
    assert found[0] == ("nothing", [*(n for n in OFF if n != "window"), "window"])
    assert found[-1][1] == ["window"]
    assert len(found) == len(OFF)


@pytest.mark.parametrize("name", [*OFF, "all"])
@pytest.mark.parametrize("key", ["gqa h32 q4 kv4 d8 window5", "swiglu h32 f64"])
def test_a_step_without_a_change_is_the_same_step(key, name):
    """Up to rounding; so what is timed without it does the same work."""
    torch.manual_seed(0)
    sub_block = parse_key(key)
    weights = {n: 0.3 * torch.randn(s) + ("norm" in n) for n, s in sub_block.tensors().items()}
    angles = torch.rand(24, 4).repeat(1, 2)
    x, ropes = torch.randn(2, 24, 32), {"default": (angles.cos(), angles.sin())}
    block = ParentBlock(sub_block=sub_block, weights=weights)
    block.statistics = loaded(sub_block, weights).calibrate([x])
    variant = variant_of(sub_block, "kv2" if key.startswith("gqa") else "0.5")
    recipe = Recipe(num_steps=1, batch_size=2, seq_len=24, lr=1e-3)
    found = []
    for off in ([], list(OFF) if name == "all" else [name]):
        with without(off):
            trainer = VariantTrainer(0, "s", [variant], block, recipe, torch.device("cpu"), torch.tensor(1e-3))
            trainer.step(Shown(loaded(sub_block, weights, in_training=True), x, ropes))
            found.append({n: value.clone() for n, value in trainer.masters.values().items()})
    start = variant.initialise(block)
    for tensor, value in found[0].items():
        assert not torch.equal(value, start[tensor])
        torch.testing.assert_close(found[1][tensor], value, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("kernel", "wanted"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTN", "gemm"),
        (
            "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off",
            "gemm",
        ),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<...>>", "gemm"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", "gemm"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<128>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_128x128x128_4x1x1_kernel0_0", "attention"),
        ("fmha_cutlassB_bf16_aligned_128x64_k128_sm80(PyTorchMemEffAttention::AttentionBackwardKernel)", "attention"),
        ("update_kernel", "optimiser"),
        ("void at::native::multi_tensor_apply_kernel<at::native::FusedAdamMathFunctor>", "optimiser"),
        ("gated_backward_kernel", "elementwise"),
        ("rope_kernel", "elementwise"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>",
            "elementwise",
        ),
    ],
)
def test_classes_of_kernels(kernel, wanted):
    assert kernel_class(kernel) == wanted


def test_products_of_a_real_trace():
    """One linear layer with an input that wants a gradient: forward, dgrad and wgrad once each; its norm has no product."""
    linear, x = nn.Linear(24, 40, bias=False), torch.randn(56, 24, requires_grad=True)
    events = traced(lambda: linear(x).square().sum().backward())
    kinds = product_kinds(events, num_tokens=56)
    assert sorted(kinds.values()) == ["dgrad", "forward", "wgrad"]
    kernels = [{"cat": "kernel", "name": "nvjet", "dur": 3.0, "args": {"External id": one}} for one in kinds]
    copies = [{"cat": "gpu_memcpy", "name": "Memcpy", "dur": 5.0, "args": {}}]
    found = seconds_by_class([*events, *kernels, *copies], num_tokens=56)
    assert found["kernels"] == 3
    assert [found[f"gemm {kind}"] for kind in ("forward", "dgrad", "wgrad")] == [3e-6] * 3
    assert found["copy"] == 5e-6
