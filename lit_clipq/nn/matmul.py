"""Matrix multiplication as a module, so that it can be named, hooked and swapped."""

from torch import Tensor

from lit_clipq.nn.prefix import Prefixed


class MatMul(Prefixed):
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
            `a @ b`, shape (..., M, N); with a prefix see `Prefixed`.
        """
        return a @ b if self.prefix_size == 0 else self.with_prefix(a, b, lambda x, y: x @ y)
