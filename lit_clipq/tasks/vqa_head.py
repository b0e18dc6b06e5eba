"""What a trained question-answering head says about itself, and the file that ships one."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lit_clipq.errors import ModelError

FORMAT = 1
MINI = "mini"


@dataclass(frozen=True)
class HeadRecord:
    """What must be the same for a head's weights to mean the same."""

    head: dict[str, Any]
    """Sizes, as `MCAN.description` gives them."""
    words: tuple[str, ...]
    """Answers by index."""
    question_only: bool
    """Whether the head never saw a picture."""
    clip: str
    """The CLIP it reads, in words."""
    clip_hash: str
    """`state_hash` of that CLIP, float."""
    variant: str = "float"
    """What was done to the CLIP before the head was trained, in words."""
    network: str = ""
    """`network_hash` of the CLIP as the head was trained on it; empty where that was not asked for."""

    def to_plain(self) -> dict[str, Any]:
        """Return the record as lists, dictionaries and plain values."""
        return {**asdict(self), "words": list(self.words), "format": FORMAT}

    @classmethod
    def from_plain(cls, content: Any, source: str) -> "HeadRecord":
        """Undo `to_plain`.

        Raises:
            ModelError: If the content is none of a record.
        """
        try:
            plain = dict(content)
            if plain.pop("format") != FORMAT:
                raise ValueError("another format")
            return cls(**{**plain, "words": tuple(plain["words"])})
        except (TypeError, KeyError, ValueError):
            raise ModelError(
                f"{source} does not hold a question-answering head of this version; give one that `lightning fit` of "
                "the VQA task wrote."
            ) from None

    def check_fits(self, head: Mapping[str, Any], clip: str, clip_hash: str, question_only: bool, source: str) -> None:
        """Check that the weights fit a run's network.

        Args:
            head: Sizes of the run's head but for its answers.
            clip: The run's CLIP, in words.
            clip_hash: `state_hash` of it, float; empty checks the sizes alone.
            question_only: Whether the run's head never sees a picture.
            source: Where the record came from, for messages.

        Raises:
            ModelError: If they do not; names both.
        """
        if clip_hash and self.clip_hash != clip_hash:
            other = self.clip if self.clip != clip else f"{self.clip} with other values"
            raise ModelError(f"the head in {source} was trained on {other}, but this run has {clip}; load that CLIP.")
        different = [
            f"{key} {self.head.get(key)} (here {value})" for key, value in head.items() if self.head[key] != value
        ]
        if different:
            raise ModelError(
                f"{source} holds another head: {', '.join(different)}; set --model.head and --model.head_options to it."
            )
        if self.question_only != question_only:
            kind = "never saw a picture" if self.question_only else "saw pictures"
            raise ModelError(
                f"the head in {source} {kind}; set --model.question_only {str(self.question_only).lower()}."
            )


def save_head(path: Path, state: Mapping[str, Tensor], record: HeadRecord) -> None:
    """Write a head's weights as fp16 safetensors with its record, whole or not at all.

    Raises:
        ModelError: A value is not finite or too large for fp16.
    """
    halves = {name: value.detach().cpu().half().contiguous() for name, value in state.items()}
    wrong = [name for name, value in halves.items() if not bool(value.isfinite().all())]
    if wrong:
        raise ModelError(f"expected finite fp16 weights, got others in {wrong[0]}; train with a lower learning rate.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(save(halves, metadata={"record": json.dumps(record.to_plain())}))
    temporary.replace(path)


def load_head(path: Path) -> tuple[dict[str, Tensor], HeadRecord]:
    """Read what `save_head` wrote; weights become float32.

    Raises:
        ModelError: If the file is absent, damaged or none of a head.
    """
    try:
        with safe_open(path, framework="pt") as file:
            plain = json.loads((file.metadata() or {}).get("record", "null"))
            state = {name: file.get_tensor(name).to(torch.float32) for name in file.keys()}  # noqa: SIM118 no mapping
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(
            f"the head {path} cannot be read ({error}); give --model.head_weights another file."
        ) from error
    return state, HeadRecord.from_plain(plain, str(path))


def head_path(weights: str, clip_name: str) -> Path:
    """Return the file of a head: a path as given, or the shipped head of a mini model.

    Raises:
        ModelError: No head ships for that CLIP.
    """
    if weights != MINI:
        return Path(weights).expanduser()
    from lit_clipq.mini import head_path as shipped

    return shipped(clip_name)
