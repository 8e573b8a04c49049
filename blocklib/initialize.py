"""How a variant starts from the parent's weights (Puzzle, arXiv 2411.19146, appendix A).

Letters: H hidden_size, N query heads, K KV heads, D head_dim, F intermediate_size, R width kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puzzle.blocklib.moments import Moments, Statistics, ridged


def merge_kv_heads(weight: Tensor, num_heads: int, num_merged: int) -> Tensor:
    """Mean-pool neighbouring heads of a K or V projection. [K·D, ...] -> [num_merged·D, ...]

    Source: GQA (arXiv 2305.13245), section 2.1. Query heads keep their order, so query head n reads merged head
    n // (N / num_merged), the mean of the heads that its neighbours read before.
    """
    dim = weight.shape[0] // num_heads
    grouped = weight.float().view(num_merged, num_heads // num_merged, dim, *weight.shape[1:])
    return grouped.mean(dim=1).reshape(num_merged * dim, *weight.shape[1:])


def contributions(last: Tensor, statistics: Statistics) -> Tensor:
    """What each channel that the last matrix [H, F] reads contributes: mean|x_i| · ‖W[:, i]‖₂ over the calibration tokens. [F]"""
    norms = last.double().norm(dim=0)
    return statistics.channel_sum.to(norms) / statistics.num_tokens * norms


def channel_order(last: Tensor, statistics: Statistics) -> Tensor:
    """Channels by falling contribution. [F]"""
    return contributions(last, statistics).argsort(descending=True, stable=True)


def surgeon(down: Tensor, gram: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(channels kept [R], in their order, and the columns of down for them [H, R]) of down [H, F], by the optimal brain surgeon with the Hessian
    Σ x xᵀ [F, F] of the squared error of down · x, a channel at a time.

    Removing channel j costs ‖w_j‖² / [H⁻¹]_jj and changes the others by -w_j [H⁻¹]_j: / [H⁻¹]_jj; the cheapest goes, until `width` are left
    (Hassibi and Stork 1993; whole columns as in ZipLM, arXiv 2302.04089). What is left is the least-squares fit on the channels kept.
    """
    size = len(gram)
    inverse = torch.linalg.inv(ridged(gram))
    weight, gone = down.to(gram), torch.zeros(size, dtype=torch.bool, device=gram.device)
    weight = weight.clone()
    for _ in range(size - width):
        diagonal = inverse.diagonal()
        cost = torch.where(gone, torch.inf, weight.square().sum(0) / diagonal.clamp(min=1e-300))
        j = cost.argmin()
        row = inverse[j] / diagonal[j]
        weight -= torch.outer(weight[:, j], row)
        inverse -= torch.outer(inverse[:, j].clone(), row)
        gone[j] = True
    kept = (~gone).nonzero().flatten()
    return kept, weight[:, kept].float()


def least_squares(moments: Moments) -> Tensor:
    """The H × H matrix with the least squared error against the sub-block on the calibration tokens. Without an intercept, as the map
    has no bias: that of an attention or FFN which has one is fitted by what enters, like all else.

    Solves W (Σ n nᵀ + λI) = Σ y nᵀ in float64, with the λ of `best_ridge`. Products of the weights, which need no text, are far from it:
    down · up drops the gate, which is mostly near 0, and O · V has every token see itself alone (docs/results.md has all errors).
    """
    return torch.linalg.solve(moments.damped, moments.cross.T).T.float()


def low_rank(matrix: Tensor, gram: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """(U [H, R], V [R, H]) whose product is nearest to W [H, H] by what both give: ‖(W - U V) C^½‖_F is least, with C = `gram` of what
    enters; None: C = I, the truncated SVD.

    U has the R main directions of what W gives, the eigenvectors of W C Wᵀ, and V = Uᵀ W. As U Uᵀ W S is the truncated SVD of W S with
    S Sᵀ = C, this is SVD-LLM's pair (arXiv 2403.07378) without S⁻¹; where W is `least_squares`', with its λ, it is reduced-rank regression
    (Izenman 1975): no other pair has a smaller error on the calibration tokens, λ ‖U V‖² included.
    """
    wide = matrix.double()
    given = wide @ wide.T if gram is None else wide @ gram.to(wide) @ wide.T
    directions = torch.linalg.eigh((given + given.T) / 2).eigenvectors[:, -rank:].flip(1)
    return directions.to(matrix.dtype).contiguous(), (directions.T @ wide).to(matrix.dtype)
