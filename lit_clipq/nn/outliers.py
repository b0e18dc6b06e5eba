"""A linear layer that multiplies a few input channels in float, apart from the others (LLM.int8, arXiv 2208.07339)."""

import torch
from torch import Tensor, nn

from lit_clipq.nn.modules import Phase, QLinear
from lit_clipq.nn.quantizer import Quantizer


class OutlierLinear(QLinear):
    """Quantized `nn.Linear` with `y = X_O W_O' + Q(X_rest) Q(W_rest)'`, O the outlier channels of the input.

    Neither grid sees the outliers: the input's range is that of the other channels, and so is the weight's, whose codes
    are 0 in the columns of O.

    Attributes:
        outliers: Which channels O is, int64; `None` until calibrated.
        outlier_weight: Their columns of the weight in float, (out, O).
    """

    id = "outlier_linear"
    outliers: Tensor | None
    outlier_weight: Tensor | None

    def __init__(
        self, original: nn.Linear, weight_quantizer: Quantizer | None, input_quantizer: Quantizer | None
    ) -> None:
        super().__init__(original, weight_quantizer, input_quantizer)
        self.register_buffer("outliers", None)
        self.register_buffer("outlier_weight", None)

    def keep(self, channels: Tensor) -> None:
        """Take the outlier channels, int64, in order; the layer holds its final float weight."""
        self.outliers = channels.to(self.weight.device)
        self.outlier_weight = self.weight.detach()[:, self.outliers].clone()

    def coded_weight(self) -> Tensor:
        """Return the weight without the columns of the outliers, which are 0."""
        weight = super().coded_weight()
        return weight if self.outliers is None else weight.index_fill(1, self.outliers, 0)

    def rounded_weight(self) -> Tensor:
        """Return the weight that freezing would give the layer."""
        rounded = super().rounded_weight()
        if self.outliers is None or self.outlier_weight is None:
            return rounded
        return rounded.index_copy(1, self.outliers, self.outlier_weight)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the output (*, out)."""
        quantizer, x = self.operand_quantizers.get("input"), inputs[0]
        if self.phase is Phase.FLOAT or quantizer is None or self.outliers is None:
            return super().forward(*inputs)
        rounded = quantizer(x.index_fill(-1, self.outliers, 0))
        return self.product(rounded.index_copy(-1, self.outliers, x.index_select(-1, self.outliers)))

    def load_codes(self, codes: Tensor) -> None:
        """Hold stored codes and the weight that they and the outliers' columns make."""
        super().load_codes(codes)
        if self.outliers is not None and self.outlier_weight is not None:
            self.weight.index_copy_(1, self.outliers, self.outlier_weight.to(self.weight))


def channels_at_least(magnitude: Tensor, threshold: float) -> Tensor:
    """Return the channels, int64, whose largest magnitude (channels,) is at least a threshold."""
    return (magnitude >= threshold).nonzero().flatten()


def channels_above_quantile(magnitude: Tensor, quantile: float) -> Tensor:
    """Return the channels, int64, whose largest magnitude (channels,) is above a quantile of those of all channels."""
    return (magnitude > torch.quantile(magnitude.double(), quantile)).nonzero().flatten()
