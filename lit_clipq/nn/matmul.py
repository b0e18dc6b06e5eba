"""Matrix multiplication as a module, so that it can be named, hooked and swapped."""

from torch import Tensor, nn


class MatMul(nn.Module):
    """Product of two activations, `a @ b`.

    Attention calls one for QK^T (`qk`) and one for attention x V (`av`), so that both products have a name in
    the module tree and can be replaced by a quantized one.
    """

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply two activations.

        Args:
            a: Left operand, shape (..., M, K).
            b: Right operand, shape (..., K, N), broadcastable against `a` in the leading axes.

        Returns:
            `a @ b`, shape (..., M, N).
        """
        return a @ b
