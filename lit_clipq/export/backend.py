"""An export in the place of a CLIP: what a task needs of one that only encodes."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_clipq.runtime import IntegerCLIP


class IntegerTowers(nn.Module):
    """Encodes with the sessions of an export.

    Args:
        exported: The export.
    """

    logit_scale: nn.Parameter

    def __init__(self, exported: IntegerCLIP) -> None:
        super().__init__()
        self._exported = exported
        scale = torch.tensor(float(exported.content["logit_scale"]))
        self.logit_scale = nn.Parameter(scale, requires_grad=False)

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Embed prepared pictures (B, 3, H, W); float32 (B, D)."""
        return self._as_tensor(self._exported.image_tower(_array(images.float())), images, normalize=normalize)

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Embed token ids (B, L); float32 (B, D)."""
        return self._as_tensor(self._exported.text_tower(_array(tokens)), tokens, normalize=normalize)

    @staticmethod
    def _as_tensor(embeddings: np.ndarray[Any, Any], like: Tensor, *, normalize: bool) -> Tensor:
        found = torch.from_numpy(embeddings).to(like.device)
        return nn.functional.normalize(found, dim=-1) if normalize else found


def _array(x: Tensor) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(x.detach().cpu().numpy())
