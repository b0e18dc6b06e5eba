"""Which pictures calibrate: seeded, unlabelled, and never one that is evaluated."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from datamodules.images import ContentIndex, Picture
from lit_clipq.contracts import Preprocessing
from lit_clipq.errors import CalibrationError, DataError
from lit_clipq.pictures import damage

logger = logging.getLogger(__name__)

HELD_OUT_SEED = 0
HELD_OUT_PICTURES = 128
HELD_OUT_SHARE = 10  # a tenth


def hold_out(pictures: Sequence[Picture], count: int | None) -> tuple[list[Picture], list[Picture]]:
    """Split pictures into an evaluation part and a calibration slice.

    The slice depends on the pictures and on `count` only, never on how many samples a calibration asks for, so that
    runs with different calibrations evaluate the same pictures.

    Args:
        pictures: All usable pictures.
        count: Size of the slice; None takes 128 pictures, or a tenth where that is less.

    Returns:
        Evaluation pictures and calibration pictures, both in the given order.

    Raises:
        DataError: Nothing would be left on one of the two sides.
    """
    size = min(HELD_OUT_PICTURES, len(pictures) // HELD_OUT_SHARE) if count is None else count
    if not 0 < size < len(pictures):
        raise DataError(
            f"A calibration slice of {size} cannot be taken out of {len(pictures)} pictures; "
            "set --data.held_out_calibration, or give other pictures with --data.calibration_root."
        )
    chosen = set(permutation(len(pictures), HELD_OUT_SEED)[:size])
    evaluation = [picture for index, picture in enumerate(pictures) if index not in chosen]
    return evaluation, [picture for index, picture in enumerate(pictures) if index in chosen]


def permutation(count: int, seed: int) -> list[int]:
    """Return 0 .. count - 1 in an order that depends on nothing but `seed`."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def choose_pictures(
    pool: Sequence[Picture],
    evaluation: Sequence[Picture],
    samples: int,
    seed: int,
    on_error: str,
    foreign: bool,
) -> list[Picture]:
    """Draw calibration pictures, each with at most one of its captions.

    Args:
        pool: Candidates, in an order that is the same on every machine; the files exist.
        evaluation: Pictures that are evaluated; a file equal to one of them, by identity or by content, never
            calibrates.
        samples: How many to draw; all where the pool is smaller, with a warning.
        seed: Seed of the draw.
        on_error: "raise" or "skip" for a candidate that does not decode.
        foreign: The pool is a folder the user named: an overlap with the evaluation is then an error. Otherwise copies
            inside one data set are passed over.

    Returns:
        Pictures in drawing order.

    Raises:
        CalibrationError: No picture is left to calibrate with.
        DataError: A damaged picture with on_error="raise", or an overlap where `foreign`.
    """
    evaluated = ContentIndex(picture.path for picture in evaluation)
    chosen: list[Picture] = []
    for index in permutation(len(pool), seed):
        if len(chosen) == samples:
            break
        picture = pool[index]
        twin = evaluated.twin(picture.path)
        if twin is not None and foreign:
            raise DataError(
                f"Calibration picture {picture.path} is also evaluated (as {twin}); "
                "point --data.calibration_root at pictures that are not in the evaluation."
            )
        reason = damage(picture.path)
        if reason and on_error == "raise":
            raise DataError(f"Calibration picture {picture.path} {reason}; replace it, or pass --data.on_error skip.")
        if twin is not None or reason:
            logger.warning("calibration passes over %s: %s", picture.path, reason or f"same content as {twin}")
            continue
        chosen.append(picture)
    if not chosen:
        raise CalibrationError(
            f"No calibration picture is left of {len(pool)} candidates; "
            "give a folder of other pictures with --data.calibration_root."
        )
    if len(chosen) < samples:
        logger.warning("%d calibration samples were asked for, %d pictures are there", samples, len(chosen))
    return with_one_caption(chosen, seed)


def caption_tokens(pictures: Sequence[Picture], preprocessing: Preprocessing) -> Tensor | None:
    """Tokenise the first text of each picture.

    Returns:
        int64 (n, context length), or None with a warning where a picture has no text.
    """
    if not all(picture.captions for picture in pictures):
        logger.warning("the calibration pictures have no captions: the text tower gets no calibration data")
        return None
    return preprocessing.tokenizer([picture.captions[0] for picture in pictures])


def with_one_caption(pictures: Sequence[Picture], seed: int) -> list[Picture]:
    """Keep one caption of each picture, drawn with `seed`."""
    draws = torch.rand(len(pictures), generator=torch.Generator().manual_seed(seed)).tolist()
    return [
        replace(picture, captions=(picture.captions[int(draw * len(picture.captions))],))
        if picture.captions
        else picture
        for picture, draw in zip(pictures, draws, strict=True)
    ]
