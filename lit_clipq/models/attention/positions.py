"""Relative positions that are added to attention scores, as tables that are looked up.

A bias that a small network computes from coordinates (arXiv 2111.09883), or that one-hot products look up, is the same
for every picture: it becomes a table of numbers, so that no product is left in it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RELATIVE_MLP = "timm.layers.pos_embed_rel.RelPosMlp"
RELATIVE_TENSORFLOW = "timm.layers.pos_embed_rel.RelPosBiasTf"


class PositionBias(nn.Module):
    """A bias (1, H, N, N) for the scores of N tokens, looked up by the relative position of query and key.

    Args:
        table: (positions, H), a Parameter or a plain tensor.
        index: int64 (n, n): row of the table for each pair of tokens.
        prefix_tokens: Tokens in front of the n that get no bias; N = n + prefix.
    """

    table: Tensor
    index: Tensor

    def __init__(self, table: Tensor, index: Tensor, prefix_tokens: int = 0) -> None:
        super().__init__()
        if isinstance(table, nn.Parameter):
            self.table = table
        else:
            self.register_buffer("table", table)
        self.register_buffer("index", index, persistent=False)
        self.prefix_tokens = prefix_tokens

    def get_bias(self) -> Tensor:
        """Return the bias (1, H, N, N)."""
        bias = self.table[self.index.flatten()].view(*self.index.shape, -1).permute(2, 0, 1).unsqueeze(0)
        return F.pad(bias, [self.prefix_tokens, 0, self.prefix_tokens, 0]).contiguous()

    def forward(self, scores: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:  # noqa: ARG002 - timm's signature
        """Add the bias to scores (B, H, N, N)."""
        return scores + self.get_bias()


@torch.no_grad()
def table_from_mlp(module: Any) -> PositionBias:
    """Convert timm's `RelPosMlp`."""
    table = module.bias_act(module.mlp(module.rel_coords_log).reshape(-1, module.num_heads))
    table = table if module.bias_gain is None else module.bias_gain * table
    return PositionBias(
        table.clone(), module.relative_position_index.view(module.window_area, -1), module.prefix_tokens
    )


def table_from_tensorflow(module: Any) -> PositionBias:
    """Convert timm's `RelPosBiasTf`, whose offsets run from the query to the key."""
    height, width = module.window_size
    device = module.relative_position_bias_table.device
    row = torch.arange(height, device=device).repeat_interleave(width)
    column = torch.arange(width, device=device).repeat(height)
    down = row[None, :] - row[:, None] + height - 1
    right = column[None, :] - column[:, None] + width - 1
    table = module.relative_position_bias_table.detach().flatten(1).t().contiguous()  # (H, h, w) -> (h * w, H)
    parameter = nn.Parameter(table, requires_grad=module.relative_position_bias_table.requires_grad)
    return PositionBias(parameter, down * (2 * width - 1) + right)
