"""LM head and KL(parent‖child) in one go: per-token divergence, LM loss and top-1 agreement without the [T, V] logits.

    kl[t] = Σ_v p (log p - log q)    p = softmax(parent · Wᵀ), q = softmax(child · Wᵀ), in nats

Both ways keep, per token, running maxima a = max lp and b = max lc of the logits, P = Σ exp(lp - a), Q = Σ exp(lc - b) and
A = Σ exp(lp - a) ((lp - a) - (lc - b)), rescaled when a maximum rises (online softmax: Milakov and Gimelshein 2018):
kl = A / P - log(P / Q). Equal logits give exactly 0, and a constant added to all logits of a token changes nothing.

- `Chunks`: cuBLAS writes a small block of logits, a kernel folds it into the running sums, and so on over the vocabulary.
  With one head for both models the second product is of child - parent, so that rounding the logits to bf16 costs a
  relative error of the divergence, not an absolute one that would hide a small KL.
- `Fused`: one kernel keeps both logit tiles in float32 accumulators; only the sums reach memory.

On a CPU, and for float64, the twin runs in chunks of rows (`linear_kl_by_rows`).

Letters: T tokens, H hidden_size, V vocab_size, S splits of the vocabulary. The gradient goes to the child's hidden state
alone, from logits computed again in chunks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no wheel for this platform: the twin serves
    triton = None  # type: ignore[assignment]

IGNORE = -100  # a target that does not count, as in torch's cross entropy
LOWEST = -1e30  # below every logit; finite, so that no difference of two is NaN


class LinearKL(NamedTuple):
    """Per token [T]: KL in nats; the child's LM loss (0 at ignored targets, None without targets); equal top-1 (bool)."""

    kl: Tensor
    lm_loss: Tensor | None
    same_top1: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunks:
    """tokens × words logits at once, twice, in `logits` (None: the dtype of the hidden states).

    tokens: None for 2048, or more where that gives fewer than 2^24 logits.
    """

    tokens: int | None = None
    words: int = 8448  # 16 × 33 tiles of 128 × 256: four full waves of 132 multiprocessors
    logits: torch.dtype | None = None
    block: int = 2048
    num_warps: int = 4

    def size(self, vocab: int) -> tuple[int, int]:
        """Tokens and words at once, of a head of `vocab` words."""
        words = min(self.words, vocab)
        return self.tokens or max(2048, 2**24 // words), words


@dataclass(frozen=True, kw_only=True, slots=True)
class Fused:
    """Tile sizes of the fused kernel; `rows_together` row blocks × `splits` share the L2."""

    block_t: int = 128
    block_v: int = 128
    block_h: int = 64
    splits: int = 33
    rows_together: int = 4
    flatten: bool = False
    num_warps: int = 8
    num_stages: int = 4


def linear_kl_reference(
    parent: Tensor, child: Tensor, weight: Tensor, child_weight: Tensor | None = None, targets: Tensor | None = None
) -> LinearKL:
    """The twin of `linear_kl` in plain PyTorch, with all logits; float32 inside, float64 for float64 inputs."""
    wide = torch.promote_types(child.dtype, torch.float32)
    lp = parent.to(wide) @ weight.to(wide).t()
    lc = child.to(wide) @ (weight if child_weight is None else child_weight).to(wide).t()
    log_p, log_q = F.log_softmax(lp, dim=-1), F.log_softmax(lc, dim=-1)
    loss = None if targets is None else F.nll_loss(log_q, targets, ignore_index=IGNORE, reduction="none")
    return LinearKL((log_p.exp() * (log_p - log_q)).sum(-1), loss, lp.argmax(-1) == lc.argmax(-1))


def linear_kl_by_rows(
    parent: Tensor,
    child: Tensor,
    weight: Tensor,
    child_weight: Tensor | None = None,
    targets: Tensor | None = None,
    config: Chunks | None = None,
) -> LinearKL:
    """The twin with no more logits at once than `config` allows: in chunks of rows, computed again in the backward pass.

    Unlike `linear_kl` it gives a gradient to everything that wants one, the heads too.
    """
    tokens, words = (config or Chunks()).size(len(weight))
    rows = max(1, tokens * words // len(weight))
    if len(child) <= rows:
        return linear_kl_reference(parent, child, weight, child_weight, targets)
    parts = [
        checkpoint(
            linear_kl_reference, parent[at : at + rows], child[at : at + rows], weight, child_weight,
            None if targets is None else targets[at : at + rows], use_reentrant=False, preserve_rng_state=False,
        )
        for at in range(0, len(child), rows)
    ]  # fmt: skip
    kl, loss, same = zip(*parts, strict=True)
    return LinearKL(torch.cat(kl), None if targets is None else torch.cat(loss), torch.cat(same))


if triton is not None:
    FLOOR = tl.constexpr(LOWEST)

    @triton.jit
    def _fold(lp, lc, gap, words, state, best):
        """Fold logits [R, W] of words [W] into the sums [R]. gap: lc - lp, or its exact source."""
        a, p_sum, b, q_sum, total = state
        best_p, best_q = best
        new_a = tl.maximum(a, tl.max(lp, 1))
        new_b = tl.maximum(b, tl.max(lc, 1))
        found_p = tl.min(tl.where(lp == new_a[:, None], words[None, :], 2147483647), 1)
        found_q = tl.min(tl.where(lc == new_b[:, None], words[None, :], 2147483647), 1)
        best_p = tl.where(new_a > a, found_p, best_p)
        best_q = tl.where(new_b > b, found_q, best_q)
        keep_p = tl.exp(a - new_a)
        p = tl.exp(lp - new_a[:, None])
        total = keep_p * (total + p_sum * ((a - new_a) - (b - new_b)))
        total += tl.sum(p * ((new_b - new_a)[:, None] - gap), 1)
        p_sum = p_sum * keep_p + tl.sum(p, 1)
        q_sum = q_sum * tl.exp(b - new_b) + tl.sum(tl.exp(lc - new_b[:, None]), 1)
        return (new_a, p_sum, new_b, q_sum, total), (best_p, best_q)

    @triton.jit
    def fold_kernel(
        first_ptr, second_ptr, targets_ptr, state_ptr, best_ptr, num_tokens, first_word, num_words,
        DELTA: tl.constexpr, HAS_TARGETS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One token per program. first, second [tokens, num_words]: the parent's logits, and the child's (or, DELTA, the
        child's minus the parent's). state [6, num_tokens]: a, P, b, Q, A, the target's logit; best [2, num_tokens]."""
        row = tl.program_id(0)
        base = row.to(tl.int64) * num_words
        one = tl.arange(0, 1)
        at = state_ptr + row + one
        state = (
            tl.load(at), tl.load(at + num_tokens), tl.load(at + 2 * num_tokens), tl.load(at + 3 * num_tokens),
            tl.load(at + 4 * num_tokens),
        )  # fmt: skip
        best = (tl.load(best_ptr + row + one), tl.load(best_ptr + num_tokens + row + one))
        for start in range(0, num_words, BLOCK):
            words = start + tl.arange(0, BLOCK)
            inside = words < num_words
            lp = tl.load(first_ptr + base + words, mask=inside, other=FLOOR).to(tl.float32)
            second = tl.load(second_ptr + base + words, mask=inside, other=0.0).to(tl.float32)
            if DELTA:
                lc = lp + second
                gap = second
            else:
                lc = tl.where(inside, second, FLOOR)
                gap = lc - lp
            state, best = _fold(lp[None, :], lc[None, :], gap[None, :], first_word + words, state, best)
        for index in tl.static_range(5):
            tl.store(at + index * num_tokens, state[index])
        tl.store(best_ptr + row + one, best[0])
        tl.store(best_ptr + num_tokens + row + one, best[1])
        if HAS_TARGETS:
            target = tl.load(targets_ptr + row).to(tl.int32) - first_word
            here = (target >= 0) & (target < num_words)
            logit = tl.load(second_ptr + base + target, mask=here, other=0.0).to(tl.float32)
            if DELTA:
                logit += tl.load(first_ptr + base + target, mask=here, other=0.0).to(tl.float32)
            tl.store(state_ptr + 5 * num_tokens + row, logit, mask=here)

    @triton.jit
    def fused_kernel(
        parent_desc, child_desc, weight_desc, child_weight_desc, targets_ptr, state_ptr, best_ptr, T, V, num_splits,
        rows_together, H: tl.constexpr, SHARED: tl.constexpr, HAS_TARGETS: tl.constexpr, FLATTEN: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    ):  # fmt: skip
        """One row block and one split of the vocabulary per program. state [S, 6, T], best [S, 2, T]."""
        group_size = rows_together * num_splits
        group = tl.program_id(0) // group_size
        rows_here = tl.minimum(tl.cdiv(T, BLOCK_T) - group * rows_together, rows_together)
        row_block = group * rows_together + (tl.program_id(0) % group_size) % rows_here
        split = (tl.program_id(0) % group_size) // rows_here
        tiles = tl.cdiv(tl.cdiv(V, BLOCK_V), num_splits)
        row = row_block * BLOCK_T
        rows = row + tl.arange(0, BLOCK_T)
        low = tl.full((BLOCK_T,), FLOOR, tl.float32)
        zero = tl.zeros((BLOCK_T,), tl.float32)
        state = (low, zero, low, zero, zero)
        best = (tl.zeros((BLOCK_T,), tl.int32), tl.zeros((BLOCK_T,), tl.int32))
        target_logit = zero
        target = tl.load(targets_ptr + rows, mask=rows < T, other=-1).to(tl.int32) if HAS_TARGETS else best[0]
        for tile in tl.range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(V, BLOCK_V)), flatten=FLATTEN):
            word = tile * BLOCK_V
            lp = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
            lc = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
            for h in range(0, H, BLOCK_H):
                from_parent = parent_desc.load([row, h])
                from_child = child_desc.load([row, h])
                head = weight_desc.load([word, h])
                lp = tl.dot(from_parent, head.T, lp, input_precision="ieee")
                if SHARED:
                    lc = tl.dot(from_child, head.T, lc, input_precision="ieee")
                else:
                    lc = tl.dot(from_child, child_weight_desc.load([word, h]).T, lc, input_precision="ieee")
            words = word + tl.arange(0, BLOCK_V)
            inside = (words < V)[None, :]
            lp = tl.where(inside, lp, FLOOR)
            lc = tl.where(inside, lc, FLOOR)
            state, best = _fold(lp, lc, lc - lp, words, state, best)
            if HAS_TARGETS:
                target_logit += tl.sum(tl.where(target[:, None] == words[None, :], lc, 0.0), 1)
        at = state_ptr + split.to(tl.int64) * 6 * T + rows
        for index in tl.static_range(5):
            tl.store(at + index * T, state[index], mask=rows < T)
        tl.store(at + 5 * T, target_logit, mask=rows < T)
        at = best_ptr + split.to(tl.int64) * 2 * T + rows
        tl.store(at, best[0], mask=rows < T)
        tl.store(at + T, best[1], mask=rows < T)

    @triton.jit
    def gradient_kernel(
        first_ptr, second_ptr, out_ptr, lse_p_ptr, lse_q_ptr, grad_kl_ptr, grad_loss_ptr, targets_ptr, first_word,
        num_words, DELTA: tl.constexpr, HAS_TARGETS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """out [tokens, num_words] = grad_kl (q - p) + grad_loss (q - [word is target]), the gradient of the logits."""
        row = tl.program_id(0)
        words = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = words < num_words
        at = row.to(tl.int64) * num_words + words
        lp = tl.load(first_ptr + at, mask=inside, other=FLOOR).to(tl.float32)
        lc = tl.load(second_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if DELTA:
            lc += lp
        p = tl.exp(lp - tl.load(lse_p_ptr + row))
        q = tl.exp(lc - tl.load(lse_q_ptr + row))
        out = tl.load(grad_kl_ptr + row) * (q - p)
        if HAS_TARGETS:
            target = tl.load(targets_ptr + row).to(tl.int32)
            hit = tl.where(first_word + words == target, 1.0, 0.0)
            out += tl.where(target >= 0, tl.load(grad_loss_ptr + row), 0.0) * (q - hit)
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


def _matmul(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b with float32 accumulation, rounded to the dtype of out."""
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(a.float() @ b.float())


def _chunks(
    parent: Tensor, children: Sequence[Tensor], weight: Tensor, child_weight: Tensor | None, config: Chunks
) -> Iterator[tuple[int, slice, int, Tensor, Tensor]]:
    """(number of the child, tokens, first word, the parent's logits, the child's or their difference); the buffers are used
    again, and the parent's logits serve all children."""
    num_tokens, num_words = config.size(len(weight))
    num_tokens = min(num_tokens, len(parent))
    buffers = torch.empty(2, num_tokens * num_words, dtype=config.logits or parent.dtype, device=parent.device)
    for token in range(0, len(parent), num_tokens):
        tokens = slice(token, min(token + num_tokens, len(parent)))
        rows = tokens.stop - token
        others = [c[tokens] - parent[tokens] if child_weight is None else c[tokens] for c in children]
        for word in range(0, len(weight), num_words):
            words = slice(word, min(word + num_words, len(weight)))
            first, second = (b[: rows * (words.stop - word)].view(rows, -1) for b in buffers)
            _matmul(parent[tokens], weight[words].t(), first)
            for number, other in enumerate(others):
                _matmul(other, (weight if child_weight is None else child_weight)[words].t(), second)
                yield number, tokens, word, first, second


def _fold_chunks(parent, children, weight, child_weight, targets, config: Chunks) -> list[tuple[Tensor, Tensor]]:  # type: ignore[no-untyped-def]
    """state [1, 6, T] and best [1, 2, T] of every child."""
    total = len(parent)
    found = []
    for child in children:
        state = torch.zeros(1, 6, total, dtype=torch.float32, device=child.device)
        state[:, 0:3:2] = LOWEST
        found.append((state, torch.zeros(1, 2, total, dtype=torch.int32, device=child.device)))
    for number, tokens, word, first, second in _chunks(parent, children, weight, child_weight, config):
        state, best = found[number]
        fold_kernel[(len(first),)](
            first, second, None if targets is None else targets[tokens], state[0, 0, tokens], best[0, 0, tokens],
            total, word, first.shape[1], DELTA=child_weight is None, HAS_TARGETS=targets is not None,
            BLOCK=min(config.block, triton.next_power_of_2(first.shape[1])), num_warps=config.num_warps,
        )  # fmt: skip
    return found


def _fold_fused(parent, child, weight, child_weight, targets, config: Fused) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """state [S, 6, T] and best [S, 2, T]."""
    (total, hidden), vocab = parent.shape, len(weight)
    splits = min(config.splits, triton.cdiv(vocab, config.block_v))
    state = torch.empty(splits, 6, total, dtype=torch.float32, device=child.device)
    best = torch.empty(splits, 2, total, dtype=torch.int32, device=child.device)
    rows, words = [config.block_t, config.block_h], [config.block_v, config.block_h]
    heads = [TensorDescriptor.from_tensor(w, words) for w in (weight, weight if child_weight is None else child_weight)]
    fused_kernel[(triton.cdiv(total, config.block_t) * splits,)](
        TensorDescriptor.from_tensor(parent, rows), TensorDescriptor.from_tensor(child, rows), *heads, targets, state, best,
        total, vocab, splits, config.rows_together, H=hidden, SHARED=child_weight is None,
        HAS_TARGETS=targets is not None, FLATTEN=config.flatten, BLOCK_T=config.block_t, BLOCK_V=config.block_v,
        BLOCK_H=config.block_h, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return state, best


def _merge(state: Tensor, best: Tensor) -> tuple[Tensor, ...]:
    """kl, log-sum-exp of the parent and of the child, the target's logit, equal top-1, each [T], from S splits."""
    a, p_sum, b, q_sum, total, logit = state.unbind(1)
    top_a, winner_a = a.max(dim=0)
    top_b, winner_b = b.max(dim=0)
    keep = torch.exp(a - top_a)
    p = (keep * p_sum).sum(0)
    q = (torch.exp(b - top_b) * q_sum).sum(0)
    shifted = (keep * (total + p_sum * ((a - top_a) - (b - top_b)))).sum(0)
    kl = shifted / p - torch.log(p / q)
    same = best[:, 0].gather(0, winner_a[None])[0] == best[:, 1].gather(0, winner_b[None])[0]
    return kl, top_a + p.log(), top_b + q.log(), logit.sum(0), same


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, child, parent, weight, child_weight, targets, config, backward) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
        if isinstance(config, Fused):
            folded = _fold_fused(parent, child, weight, child_weight, targets, config)
        else:
            [folded] = _fold_chunks(parent, [child], weight, child_weight, targets, config)
        kl, lse_p, lse_q, logit, same = _merge(*folded)
        loss = torch.zeros_like(kl) if targets is None else torch.where(targets == IGNORE, 0.0, lse_q - logit)
        ctx.save_for_backward(child, parent, weight, child_weight, targets, lse_p, lse_q)
        ctx.config = backward
        ctx.mark_non_differentiable(same)
        return kl, loss, same

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        child, parent, weight, child_weight, targets, lse_p, lse_q = ctx.saved_tensors
        grad_kl, grad_loss = (g.float().contiguous() for g in grad_outputs[:2])
        head = weight if child_weight is None else child_weight
        out = torch.empty_like(child)
        total: Tensor | None = None
        for _, tokens, word, first, second in _chunks(parent, [child], weight, child_weight, ctx.config):
            rows, num_words = first.shape
            grad = torch.empty(rows, num_words, dtype=child.dtype, device=child.device)
            gradient_kernel[(rows, triton.cdiv(num_words, 1024))](
                first, second, grad, lse_p[tokens], lse_q[tokens], grad_kl[tokens], grad_loss[tokens],
                None if targets is None else targets[tokens], word, num_words, DELTA=child_weight is None,
                HAS_TARGETS=targets is not None, BLOCK=1024, num_warps=4,
            )  # fmt: skip
            part = torch.empty(rows, child.shape[1], dtype=torch.float32, device=child.device)
            _matmul(grad, head[word : word + num_words], part)
            total = part if total is None else total.add_(part)
            if word + num_words == len(weight):
                out[tokens], total = total, None
        return out, None, None, None, None, None, None


def _runs_here(x: Tensor) -> bool:
    """Whether the kernels do; else the twin serves."""
    there = triton is not None and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")
    return there and x.dtype != torch.float64


def _fused_wins(child: Tensor) -> bool:
    """On an H100 (sm_90) in bf16: 26 ms against 28 ms in chunks at T 8192, H 4096, V 128256, with an eighth of the memory."""
    wide = child.shape[1] % 64 == 0 and child.dtype == torch.bfloat16
    return wide and child.is_cuda and torch.cuda.get_device_capability(child.device)[0] == 9


def linear_kl(
    parent: Tensor,
    child: Tensor,
    weight: Tensor,
    child_weight: Tensor | None = None,
    targets: Tensor | None = None,
    *,
    config: Chunks | Fused | None = None,
    backward: Chunks | None = None,
) -> LinearKL:
    """Divergence of the child's next-token distribution from the parent's, per token.

    parent, child: hidden states after the final norm [T, H]; weight: the LM head of the parent, and of the child unless
    child_weight is given [V, H]; one dtype, bf16, float32 or (slowly) float64. targets [T] int64, -100 to leave a token out.
    `kl` and `lm_loss` carry a gradient to `child`; nothing else gets one. Top-1 ties go to the lowest word.
    Errors of kl: about 3e-7 absolute, and relative ones of the logits' rounding (module docstring).
    Raises ValueError for shapes or dtypes that do not fit.
    """
    heads = [weight] if child_weight is None else [weight, child_weight]
    if parent.shape != child.shape or parent.dim() != 2 or any(w.shape != (len(weight), child.shape[1]) for w in heads):
        shapes = [tuple(x.shape) for x in (parent, child, *heads)]
        raise ValueError(f"want hidden states [T, H] twice and heads [V, H], not {shapes}")
    if len({x.dtype for x in (parent, child, *heads)}) != 1:
        raise ValueError(f"one dtype for all, not {[str(x.dtype) for x in (parent, child, *heads)]}")
    if targets is not None and targets.shape != parent.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} for {len(parent)} tokens")
    parent, weight = parent.detach(), weight.detach()
    child_weight = None if child_weight is None else child_weight.detach()
    if not _runs_here(child):
        rows = config if isinstance(config, Chunks) else None
        return linear_kl_by_rows(parent, child, weight, child_weight, targets, rows)
    parent, child, weight = parent.contiguous(), child.contiguous(), weight.contiguous()
    child_weight = None if child_weight is None else child_weight.contiguous()
    targets = None if targets is None else targets.contiguous()
    if config is None:
        config = Fused() if _fused_wins(child) else Chunks()
    with torch.cuda.device_of(child):  # Triton launches on the current device
        found = _LinearKL.apply(child, parent, weight, child_weight, targets, config, backward or Chunks())
    return LinearKL(found[0], None if targets is None else found[1], found[2])


@torch.no_grad()
def linear_kl_of_many(
    parent: Tensor, children: Sequence[Tensor], weight: Tensor, targets: Tensor | None = None, *, config: Chunks
) -> list[LinearKL]:
    """`linear_kl` of several children [T, H] that have the parent's head, whose logits are computed once. No gradient."""
    if not _runs_here(parent):
        return [linear_kl_by_rows(parent, child, weight, None, targets, config) for child in children]
    parent, weight = parent.contiguous(), weight.contiguous()
    targets = None if targets is None else targets.contiguous()
    with torch.cuda.device_of(parent):  # Triton launches on the current device
        folded = _fold_chunks(parent, [child.contiguous() for child in children], weight, None, targets, config)
    found = []
    for kl, _, lse_q, logit, same in (_merge(*one) for one in folded):
        loss = None if targets is None else torch.where(targets == IGNORE, 0.0, lse_q - logit)
        found.append(LinearKL(kl, loss, same))
    return found
