"""What an error at a layer costs: gradients of the outputs that matter, to be back-propagated once.

The objective of a scale is `sum g^2 (O^ - O)^2` over all elements of a layer's output, with g the gradient of a loss by
that element: the diagonal of the Fisher information, or of the Gauss-Newton matrix. Both need a random draw; a loss
taken between the float network and itself has no gradient at all.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_clipq.calibration.batches import Rows
from lit_clipq.calibration.observations import Observations
from lit_clipq.distributed import gather
from lit_clipq.errors import CalibrationError

log = logging.getLogger(__name__)
_NOISE = 1e-5  # a softmax whose largest slope is below is one-hot
_ROUNDING = 1e-14  # of squared float32 gradients, against the layer with the largest


def drawn_by(*numbers: int) -> torch.Generator:
    """Return a generator on the CPU whose draws depend on each of the numbers, none of them negative.

    `torch.Generator.manual_seed` keeps 32 bits of its argument; numpy's `SeedSequence` mixes all of them into these.
    """
    (mixed,) = np.random.SeedSequence(numbers).generate_state(1)
    return torch.Generator().manual_seed(int(mixed))


def contrastive_cotangents(
    image: Tensor, text: Tensor, temperature: float, seed: int, draw: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `-sum log p(y)` by the embeddings, for drawn y.

    With p = softmax(image @ text^T / temperature) along both axes, a class y is drawn from p for every picture and
    every text. The expected squared gradient is the diagonal of the Fisher information (Kunstner et al., arXiv
    1905.12558); labels are not used. CLIP's own temperature of 0.01 makes p almost one-hot, so that few samples decide
    everything.

    Args:
        image: Embeddings of length 1, (N, D), in global order.
        text: Embeddings of length 1, (N, D); text i belongs to picture i.
        temperature: Divides the similarities.
        seed: Of the draws.
        draw: Which of them.

    Returns:
        Gradients by image and text, each (N, D) float32.

    Raises:
        CalibrationError: For fewer than two pairs, or gradients at the level of rounding noise.
    """
    if len(image) < 2:
        raise CalibrationError(
            f"the image-text softmax needs at least 2 calibration pairs, got {len(image)}; raise calibration_samples"
        )
    image64, text64 = image.double().cpu(), text.double().cpu()
    logits = image64 @ text64.T / temperature
    generator = drawn_by(seed, draw)
    slope = _score(logits, generator) + _score(logits.T, generator).T
    if slope.abs().max() < _NOISE:
        raise CalibrationError(
            f"the image-text softmax at temperature {temperature} is one-hot: its largest gradient is "
            f"{slope.abs().max():.1e}; raise the temperature or take the Gauss-Newton objective"
        )
    slope /= temperature
    by_image, by_text = slope @ text64, slope.T @ image64
    log.info("effective sample size %.1f of %d", effective_sample_size(by_image), len(image))
    return by_image.to(image), by_text.to(text)


def _score(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return p - onehot(y) for y drawn from p = softmax(logits) along the last axis."""
    p = logits.softmax(dim=-1)
    drawn = torch.multinomial(p, 1, generator=generator)
    return p.scatter_add(1, drawn, -torch.ones_like(drawn, dtype=p.dtype))


def random_directions(shape: torch.Size, keys: Tensor, seed: int, draws: int = 1, *, output: int = 0) -> Tensor:
    """Return random signs scaled to length 1 for each draw and sample, (K, B, *) float32.

    With v such a direction of d elements and J the Jacobian of a sample's outputs, the expected square of J^T v is
    diag(J^T J) / d, the Gauss-Newton diagonal (Hutchinson's estimator).

    Args:
        shape: Shape of the outputs, samples first.
        keys: Global sample numbers int64 (B,): the direction of a sample depends on its number, the output and the
            seed alone.
        seed: Of the draw.
        draws: How many directions a sample has.
        output: The number of the output, so that several outputs of a sample have directions of their own.
    """
    rows = []
    for key in keys.tolist():
        generator = drawn_by(seed, output, key)
        rows.append(torch.randint(0, 2, (draws, *shape[1:]), generator=generator).mul_(2).sub_(1).float())
    return torch.stack(rows, dim=1) / max(1, shape[1:].numel()) ** 0.5


def gauss_newton_cotangents(seed: int, draws: int) -> Callable[[Mapping[str, Tensor], Rows], dict[str, Tensor]]:
    """Return a function from (outputs, rows) of a batch to random directions of each output, (draws, *).

    Args:
        seed: Of the draws; each output has draws of its own.
        draws: How many directions a sample has; their squares add up to a mean.
    """
    return lambda outputs, rows: {
        name: random_directions(value.shape, rows.samples, seed, draws, output=i).to(value) / draws**0.5
        for i, (name, value) in enumerate(sorted(outputs.items()))
    }


def fisher_cotangents(
    numbers: Sequence[int], outputs: Mapping[str, Sequence[Tensor]], temperature: float, seed: int, draws: int
) -> Callable[[Mapping[str, Tensor], Rows], dict[str, Tensor]]:
    """Differentiate the image-text softmax of the whole calibration set, over all ranks, for every draw.

    Args:
        numbers: Sample numbers of this rank, in order.
        outputs: This rank's embeddings `image` and `text`, (B, D) a batch.
        temperature: Of the softmax.
        seed: Of the draws.
        draws: How many draws there are; their squares add up to a mean.

    Returns:
        A function from (outputs, rows) of a batch to gradients (draws, B, D) of pictures and texts.

    Raises:
        CalibrationError: For outputs that are no embeddings of pictures and texts in pairs, or a one-hot softmax.
    """
    pieces = gather((list(numbers), {name: torch.cat(list(values)) for name, values in outputs.items()}))
    pieces = [piece for piece in pieces if piece[0]]
    others = sorted({name for _, rows in pieces for name in rows} - {"image", "text"})
    if others:
        raise CalibrationError(
            f"the Fisher objective takes embeddings of pictures and texts, got {', '.join(others)}; for "
            "a task without image-text softmax take the Gauss-Newton objective"
        )
    counts = [{name: len(rows[name]) if name in rows else 0 for name in ("image", "text")} for _, rows in pieces]
    if any(set(count.values()) != {len(piece[0])} for count, piece in zip(counts, pieces, strict=True)):
        raise CalibrationError(
            "the Fisher objective needs calibration pairs of pictures and texts, got "
            f"{sum(c['image'] for c in counts)} pictures and {sum(c['text'] for c in counts)} texts that are not "
            "paired batch by batch; give captions or take the Gauss-Newton objective"
        )
    order = sorted((number, i) for i, number in enumerate(n for own, _ in pieces for n in own))
    image, text = (torch.cat([rows[name] for _, rows in pieces])[[i for _, i in order]] for name in ("image", "text"))
    drawn = [contrastive_cotangents(image, text, temperature, seed, i) for i in range(draws)]
    gradients = {
        name: {number: row for (number, _), row in zip(order, torch.stack(found, dim=1), strict=True)}
        for name, found in zip(("image", "text"), zip(*drawn, strict=True), strict=True)
    }
    return lambda batch_outputs, rows: {
        name: torch.stack([gradients[name][number] for number in rows.samples.tolist()], dim=1).to(value) / draws**0.5
        for name, value in batch_outputs.items()
        if name in gradients
    }


def effective_sample_size(cotangents: Tensor) -> float:
    """Return (sum w)^2 / sum w^2 of the squared gradient norms w of the samples: N where all weigh the same."""
    weight = cotangents.flatten(1).square().sum(dim=1)
    return (weight.sum().square() / weight.square().sum()).item()


def named_outputs(outputs: Any) -> Mapping[str, Tensor]:
    """Return what a calibration forward gave as tensors by name; a bare tensor is called `output`.

    Raises:
        CalibrationError: If it is neither a tensor nor a dictionary of tensors.
    """
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    if isinstance(outputs, Mapping) and all(isinstance(value, Tensor) for value in outputs.values()):
        return outputs
    raise CalibrationError(
        f"expected a calibration forward that returns tensors by name, got {type(outputs).__name__}; return the "
        "outputs that matter, or set equalize to false and take another distance"
    )


def back_propagate(outputs: Mapping[str, Tensor], cotangents: Mapping[str, Tensor], *, keep: bool = False) -> None:
    """Back-propagate the cotangents; outputs without one, or that no recorded layer leads to, are left out.

    Args:
        outputs: What a calibration forward gave.
        cotangents: Gradient of the objective by some of them.
        keep: Whether another backward pass through the same outputs follows.
    """
    names = [name for name, value in outputs.items() if value.requires_grad and name in cotangents]
    if names:
        values, gradients = [outputs[name] for name in names], [cotangents[name] for name in names]
        torch.autograd.backward(values, gradients, retain_graph=keep)


def check_gradients(names: Sequence[str], seen: Mapping[str, Sequence[Observations]]) -> None:
    """Check, over all ranks, that each layer received gradients that can be relied on.

    Raises:
        CalibrationError: On every rank, if the squared gradients of a layer add up to NaN, Inf, zero, or what rounding
            alone gives; names the layer.
    """
    own = [
        torch.stack([o.weight.sum(dtype=torch.float64) for o in seen[name] if o.weight is not None]).sum().item()
        if any(o.weight is not None for o in seen.get(name, ()))
        else 0.0
        for name in names
    ]
    totals = [sum(rank) for rank in zip(*gather(own), strict=True)]
    for name, total in zip(names, totals, strict=True):
        if not math.isfinite(total):
            raise CalibrationError(
                f"layer {name} received NaN or Inf as gradient; check the calibration samples, or calibrate in float32"
            )
    for name, total in zip(names, totals, strict=True):
        if total <= _ROUNDING * max(totals):
            raise CalibrationError(
                f"layer {name} received no gradient beyond rounding (sum of squares {total:.1e}): the calibrated "
                "outputs do not depend on it; exclude it or take an objective whose outputs do"
            )
