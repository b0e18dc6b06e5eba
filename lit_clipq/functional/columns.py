"""Rounding a weight column by column, each column's error passed on to the columns that are not rounded yet.

For a product X W^T the change of the weight from W to Q costs `tr (W - Q) H (W - Q)^T` with H = X^T X. Rounding columns
in turn and moving those that are left to the best place for what was done is optimal brain quantization; with U upper
triangular, U^T U = H^-1, column i passes on `-(w_i - q_i) / U_ii * U[i, i:]` (GPTQ, arXiv 2210.17323).

Weights have shape (G, R, d): G groups of a convolution (1 elsewhere), R output channels each, d input columns.
"""

import torch
from torch import Tensor

_BLOCK = 128  # columns that are updated at once
LEAST_RIDGE = 1e-9
"""Smallest share of the mean diagonal with which what is singular can be solved in float64."""


def inverse_factor(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Return U (G, d, d) upper triangular with `U^T U = H^-1`, and whether it exists, bool (G,).

    With M upper triangular and M M^T = H, which is the Cholesky factor of H read from behind, U is the inverse of M:
    the inverse of H itself is never formed.

    Args:
        hessian: H (G, d, d), symmetric, float64.
    """
    factor, failed = torch.linalg.cholesky_ex(hessian.flip(-1, -2))
    eye = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    good = failed == 0
    upper = torch.where(good[:, None, None], factor.flip(-1, -2), eye)
    inverse = torch.linalg.solve_triangular(upper, eye.expand_as(upper), upper=True)
    return inverse, good & inverse.isfinite().flatten(1).all(1)


def damped(hessian: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """Return H with `damp` times its mean diagonal added to the diagonal, and which columns are dead, bool (G, d).

    A dead column has H_jj = 0: no input reaches it. It gets H_jj = 1, so that it is rounded by itself; the mean is that
    of the others.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    dead = diagonal <= 0
    alive = (~dead).sum(-1, keepdim=True).clamp(min=1)
    ridge = damp * diagonal.clamp(min=0).sum(-1, keepdim=True) / alive
    return hessian + torch.diag_embed(torch.where(dead, 1 - diagonal, ridge)), dead


def asymmetric_push(factor: Tensor, deviation: Tensor, strength: float) -> Tensor:
    """Return P (G, d, d), strictly upper: what column i passes on because the input was rounded, too.

    `P = strength * triu(D U^T, 1) U` with D = (X - X^)^T X^, X the exact and X^ the rounded input (GPTAQ, arXiv
    2504.02692). Column i then adds `w_i P[i, i:]` to what follows it.

    Args:
        factor: U of `inverse_factor`.
        deviation: D (G, d, d).
        strength: By how much; 1 is all of it.
    """
    return strength * (deviation @ factor.mT).triu(1) @ factor


def round_columns(
    weight: Tensor, factor: Tensor, scale: Tensor, low: Tensor, high: Tensor, push: Tensor | None = None
) -> Tensor:
    """Return whole steps (G, R, d) to round a weight to, `q = scale * step`, columns in order.

    Args:
        weight: W (G, R, d), float64.
        factor: U of `inverse_factor`.
        scale: Step of each element's grid, of the shape of the weight.
        low: Smallest whole step of each element.
        high: Largest.
        push: P of `asymmetric_push`.
    """
    # Columns lie one after the other, and few operations touch each: on a GPU the launches take the time.
    weight, rate, scale, low, high = (x.mT.contiguous() for x in (weight, 1 / scale, scale, low, high))
    unit = factor / factor.diagonal(dim1=-2, dim2=-1)[..., None]  # errors are divided by U_ii once, here
    steps, columns = torch.empty_like(weight), weight.shape[1]
    for start in range(0, columns, _BLOCK):
        now, rest = slice(start, start + _BLOCK), slice(start + _BLOCK, columns)
        block = weight[:, now].clone()
        errors, values = torch.empty_like(block), torch.empty_like(block)
        outer = [unit[:, now, now]] if push is None else [unit[:, now, now], push[:, now, now]]
        each = zip(
            *(x.unbind(1) for x in (block, errors, values, steps[:, now])),
            *(x[:, now].unbind(1) for x in (rate, scale, low, high)),
            *(x.unsqueeze(-1).unbind(1) for x in outer),
            strict=True,
        )
        for w, error, value, step, per, size, least, most, *passed in each:  # (G, R) each, those passed (G, block, 1)
            torch.mul(w, per, out=step).round_().clamp_(least, most)
            torch.addcmul(w, step, size, value=-1, out=error)
            if push is not None:
                value.copy_(w)
                block.baddbmm_(passed[1], value.unsqueeze(1))
            block.baddbmm_(passed[0], error.unsqueeze(1), alpha=-1)  # zero for those that are done
        weight[:, rest].baddbmm_(unit[:, now, rest].mT, errors, alpha=-1)
        if push is not None:
            weight[:, rest].baddbmm_(push[:, now, rest].mT, values)
    return steps.mT.contiguous()


def round_halves(weight: Tensor, hessian: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return whole steps (G, R, d) to round a weight to, half of the columns that are left at a time.

    After each half the rest moves by `-d1 H12 (H22)^-1`, d1 what rounding changed: the least squares answer to it (the
    second step of ERQ, arXiv 2407.06794).

    Args:
        weight: W (G, R, d), float64.
        hessian: H (G, d, d), positive definite.
        scale: Step of each element's grid, of the shape of the weight.
        low: Smallest whole step of each element.
        high: Largest.
    """
    weight, steps = weight.clone(), torch.empty_like(weight)
    start, columns = 0, weight.shape[-1]
    while start < columns:
        end = start + (columns - start + 1) // 2
        now, rest = slice(start, end), slice(end, columns)
        steps[..., now] = (weight[..., now] / scale[..., now]).round_().clamp_(low[..., now], high[..., now])
        if end < columns:
            change = steps[..., now] * scale[..., now] - weight[..., now]
            weight[..., rest] -= torch.linalg.solve(hessian[:, rest, rest], hessian[:, rest, now] @ change.mT).mT
        start = end
    return steps
