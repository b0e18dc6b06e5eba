"""A table of embeddings stored as codes: no product, but a sixth of the size of a CLIP."""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from lit_clipq.functional.granularity import PerTensor, at_run_time
from lit_clipq.functional.uniform import from_codes
from lit_clipq.nn.modules import QWeighted, storage_shift
from lit_clipq.nn.quantizer import Quantizer, UniformQuantizer


class QEmbedding(QWeighted):
    """Quantized `nn.Embedding`: ids (*) to rows (*, D). Only the table is quantized.

    After `freeze` no float copy of the table exists: a lookup decodes the rows it needs. The grid is per tensor, per
    row (`PerChannel(0)`) or per group of a row.

    Raises:
        ValueError: For a table that renormalises its rows, or a grid along another axis.
    """

    id = "embedding"
    operands = ()

    def __init__(self, original: nn.Embedding, weight_quantizer: Quantizer | None) -> None:
        if original.max_norm is not None:
            raise ValueError("expected a table with max_norm=None: lookups that change the table cannot be quantized")
        granularity = PerTensor() if weight_quantizer is None else weight_quantizer.granularity
        if at_run_time(granularity) or getattr(granularity, "axis", 0) != 0:
            raise ValueError(f"expected a grid per tensor, per row or per group for a table, got {granularity}")
        super().__init__(original, weight_quantizer)
        self.num_embeddings, self.embedding_dim = original.num_embeddings, original.embedding_dim
        self.padding_idx = original.padding_idx

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the rows of the ids, shape (*, D), in the type of the float table."""
        if self.weight_codes is None:
            return self.product(*inputs)
        ids = inputs[0]
        rows = self._decode(ids.reshape(-1))
        return rows.to(self.weight_dtype).reshape(*ids.shape, self.embedding_dim)

    def product_with(self, weight: Tensor, *inputs: Tensor) -> Tensor:
        """Look the ids up in a float table."""
        return F.embedding(inputs[0], weight, self.padding_idx)

    def load_codes(self, codes: Tensor) -> None:
        """Hold stored codes in place of the float table."""
        self.weight_codes = codes
        if "weight" in self._parameters:
            del self.weight

    def _decode(self, ids: Tensor) -> Tensor:
        """Decode the rows of ids (N,) to (N, D)."""
        quantizer = cast(Quantizer, self.weight_quantizer)
        codes = cast(Tensor, self.weight_codes).index_select(0, ids).int() + storage_shift(quantizer)
        if not isinstance(quantizer, UniformQuantizer) or isinstance(quantizer.granularity, PerTensor):
            return quantizer.decode(codes)
        scale, zero_point = cast(Tensor, quantizer.scale), cast(Tensor, quantizer.zero_point)
        return from_codes(codes, scale[ids], zero_point[ids], quantizer.granularity)
