"""Orthogonal matrices: Hadamard where the size allows, else random; and those that keep the vector of ones."""

import torch
from torch import Tensor


def hadamard(n: int) -> Tensor | None:
    """Return a Hadamard matrix of order `n` whose first column is ones, float64 (n, n); `None` where none is known.

    Sylvester's doubling of Paley's first construction: orders 2^k (q + 1) with q = 1 (doubling alone) or a prime that
    leaves 3 modulo 4; 768 = 12 * 64 and 1280 = 20 * 64 are among them.

    Example:
        >>> matrix = hadamard(12)
        >>> torch.equal(matrix @ matrix.T, 12 * torch.eye(12, dtype=torch.float64))
        True
        >>> hadamard(2730) is None
        True
    """
    base, doublings = n, 0
    while base > 0:
        core = _paley(base)
        if core is not None:
            matrix = core
            for _ in range(doublings):
                matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
            return matrix * matrix[:, :1]
        if base % 2:
            return None
        base, doublings = base // 2, doublings + 1
    return None


def _paley(n: int) -> Tensor | None:
    """Return a Hadamard matrix of order 1, or of `q + 1` with q a prime that leaves 3 modulo 4; else `None`."""
    q = n - 1
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if q % 4 != 3 or any(q % p == 0 for p in range(2, int(q**0.5) + 1)):
        return None
    residues = torch.full((q,), -1.0, dtype=torch.float64)
    residues[[i * i % q for i in range(1, q)]] = 1
    residues[0] = 0
    index = torch.arange(q)
    matrix = torch.eye(n, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1, -1
    matrix[1:, 1:] += residues[(index[:, None] - index) % q]
    return matrix


def random_orthogonal(n: int, seed: int) -> Tensor:
    """Return an orthogonal matrix, float64 (n, n): Hadamard with random signs of its rows, else uniformly random.

    Args:
        n: Its size.
        seed: Of the signs, or of the Gaussian matrix whose QR decomposition it is.
    """
    generator = torch.Generator().manual_seed(seed)
    matrix = hadamard(n)
    if matrix is not None:
        return _signs(n, generator)[:, None] * matrix / n**0.5
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def keeping_ones(n: int, seed: int) -> Tensor:
    """Return an orthogonal R with `R 1 = 1`, float64 (n, n): `R = B diag(1, Q) B^T`, B's first column 1 / sqrt(n).

    A LayerNorm without gain and bias commutes with it: mean and variance of `x R` are those of x.

    Args:
        n: Its size.
        seed: Of Q. Where there is a Hadamard matrix of that order it is B, and Q is a diagonal of random signs; else B
            is a reflection, and Q uniformly random.

    Example:
        >>> rotation = keeping_ones(768, 0)
        >>> bool((rotation.sum(0) - 1).abs().max() < 1e-12)
        True
    """
    basis = hadamard(n)
    if basis is not None:
        signs = _signs(n, torch.Generator().manual_seed(seed))
        signs[0] = 1
        return (basis * signs) @ basis.T / n
    v = torch.full((n,), -(n**-0.5), dtype=torch.float64)
    v[0] += 1
    reflection = torch.eye(n, dtype=torch.float64) - 2 * torch.outer(v, v) / v.square().sum() if n > 1 else v[:, None]
    inner = torch.eye(n, dtype=torch.float64)
    inner[1:, 1:] = random_orthogonal(n - 1, seed)
    return reflection @ inner @ reflection.T


def _signs(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (n,), generator=generator, dtype=torch.float64) * 2 - 1
