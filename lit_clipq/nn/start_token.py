"""Attention products of causal text towers, with the start token's key and value kept as float constants.

In a causal tower the first position sees itself alone, so its key and value are the same for every text. They are
also outliers that would stretch every range. Here they are constants of the layer: the column of the scores and the
term of the average that belong to the start token stay float, and the grids serve the other positions only.
"""

from torch import Tensor

from lit_clipq.nn.modules import Phase, QMatMul


class StartTokenScores(QMatMul):
    """Quantized QK^T: a = queries (B, H, L, d), b = keys (B, H, d, L); column 0 is `a @ constant`, in float.

    Attributes:
        constant: Key of the start token, (1, H, d, 1); `None` until calibrated.
    """

    id = "start_token_scores"
    constant: Tensor | None

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.register_buffer("constant", None)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return scores (B, H, L, L)."""
        scores = super().forward(*inputs)
        if self.phase is Phase.QUANTIZED and self.constant is not None:
            scores[..., :1] = inputs[0] @ self.constant
        return scores

    @staticmethod
    def first_position(b: Tensor) -> Tensor:
        """Return the keys (B, H, d, 1) of the first position."""
        return b[..., :1].detach()


class StartTokenAverage(QMatMul):
    """Quantized attention x V: a = weights (B, H, L, L), b = values (B, H, L, d); the start token's term is float.

    Attributes:
        constant: Value of the start token, (1, H, 1, d); `None` until calibrated.
    """

    id = "start_token_average"
    constant: Tensor | None

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.register_buffer("constant", None)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return averaged values (B, H, L, d)."""
        if self.phase is Phase.FLOAT or self.constant is None:
            return super().forward(*inputs)
        a, b = inputs
        return super().forward(a[..., 1:], b[..., 1:, :]) + a[..., :1] * self.constant

    @staticmethod
    def first_position(b: Tensor) -> Tensor:
        """Return the values (B, H, 1, d) of the first position."""
        return b[..., :1, :].detach()
