"""N: how many samples a result rests on, and in words."""

from collections.abc import Mapping

ABOUT_THE_DATA = frozenset(
    {
        "skipped",
        "calibration_held_out",
        "blank_captions",
        "blank_questions",
        "pictures_without_captions",
        "files_not_read",
        "classes",
        "vocabulary",
    }
)
"""Counts that hold whether or not all samples of a data set are evaluated."""


def evaluated_counts(evaluated: Mapping[str, int], listed: Mapping[str, int]) -> dict[str, int]:
    """Combine what was evaluated with what the data set tells of itself.

    Where a limit on the batches left samples out, these are counted under `NAME_not_evaluated`, and what the data set
    counts over all of its samples is left out.

    Args:
        evaluated: Samples by kind, as the metric saw them.
        listed: Samples by kind that are there, and counts about them.

    Returns:
        Counts by name, those of the evaluation first.

    Example:
        >>> evaluated_counts({"images": 8}, {"images": 20, "skipped": 1, "captions": 100})
        {'images': 8, 'images_not_evaluated': 12, 'skipped': 1}
    """
    left_out = {f"{name}_not_evaluated": listed.get(name, 0) - count for name, count in evaluated.items()}
    left_out = {name: count for name, count in left_out.items() if count > 0}
    rest = {name: count for name, count in listed.items() if name not in evaluated}
    if left_out:
        rest = {name: count for name, count in rest.items() if name in ABOUT_THE_DATA}
    return {**evaluated, **left_out, **rest}


def describe_counts(counts: Mapping[str, int]) -> str:
    """Return counts in words; texts that are longer than the model reads with their share and the length.

    Example:
        >>> describe_counts({"images": 1000, "texts": 180, "texts_cut": 18, "context_length": 32})
        '1,000 images, 18 of 180 texts cut at 32 tokens'
    """
    told = dict(counts)
    cut = [told.pop(name, None) for name in ("texts_cut", "texts", "context_length")]
    words = [f"{count:,} {name.replace('_', ' ')}" for name, count in told.items()]
    if cut[0]:
        words.append("{:,} of {:,} texts cut at {:,} tokens".format(*cut))
    return ", ".join(words)
