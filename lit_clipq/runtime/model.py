"""An exported CLIP: embeddings of pictures and texts, and what follows from them."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lit_clipq.errors import ConfigError, DataError, LitClipqError, ModelError
from lit_clipq.pictures import load_rgb
from lit_clipq.runtime.folder import PREPROCESS_FILE, TOKENIZER_FILE, TOWER_FILES, read_export
from lit_clipq.runtime.preprocess import ImageTransform
from lit_clipq.runtime.session import Session, cpu_flags, multiplies_exactly, open_session
from lit_clipq.runtime.tokenizer import Tokenizer

Array = np.ndarray[Any, Any]
Picture = Image.Image | str | Path


class IntegerCLIP:
    """Both towers of an export, with what prepares their input. Made by `load`.

    Attributes:
        content: What `export.json` says.
        transform: Pictures to input.

    Args:
        content: What `export.json` says.
        sessions: By tower, `image` and `text`.
        transform: Pictures to input.
        tokenizer: Texts to token ids; `None` where the model has one that could not be exported.
    """

    def __init__(
        self,
        content: Mapping[str, Any],
        sessions: Mapping[str, Session],
        transform: ImageTransform,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.content = content
        self.transform = transform
        self._sessions = sessions
        self._tokenizer = tokenizer

    def embed_images(self, pictures: Iterable[Picture], *, batch_size: int = 8) -> Array:
        """Embed pictures.

        Args:
            pictures: RGB pictures, or paths of files; read as they are needed.
            batch_size: Pictures in one run.

        Returns:
            float32 (n, D), of length 1 each.

        Raises:
            DataError: For a file that cannot be read as a picture.
        """
        batches = _batches(pictures, batch_size)
        rows = [self.image_tower(np.stack([self.transform(_opened(p)) for p in batch])) for batch in batches]
        return _normalised(np.concatenate(rows)) if rows else self._nothing()

    def embed_texts(self, texts: Sequence[str], *, batch_size: int = 64) -> Array:
        """Embed texts.

        Args:
            texts: A list; longer ones than the context are cut.
            batch_size: Texts in one run.

        Returns:
            float32 (n, D), of length 1 each.

        Raises:
            ConfigError: Where the model's tokenizer is not part of the export.
        """
        if self._tokenizer is None:
            raise ConfigError(
                f"this export has no tokenizer ({self.content['tokenizer']['reason']}); tokenize yourself and call "
                "text_tower"
            )
        rows = [self.text_tower(self._tokenizer(batch)) for batch in _batches(texts, batch_size)]
        return _normalised(np.concatenate(rows)) if rows else self._nothing()

    def tokenize(self, texts: Sequence[str]) -> Array:
        """Return the token ids of texts, int64 (n, context length).

        Raises:
            ConfigError: Where the model's tokenizer is not part of the export.
        """
        if self._tokenizer is None:
            raise ConfigError(f"this export has no tokenizer ({self.content['tokenizer']['reason']})")
        return self._tokenizer(texts)

    def image_tower(self, images: Array) -> Array:
        """Run the image tower on prepared pictures, float32 (B, 3, H, W); embeddings (B, D), not normalised."""
        return self._sessions["image"].run(None, {"images": images})[0]

    def text_tower(self, tokens: Array) -> Array:
        """Run the text tower on token ids, int64 (B, L); embeddings (B, D), not normalised.

        Where positions behind the end token do not matter, only those up to the last end in the batch are computed.
        """
        text = self.content["towers"]["text"]
        if text["free_length"] and len(tokens):
            marks = tokens if text["end_token"] is None else tokens == text["end_token"]
            tokens = np.ascontiguousarray(tokens[:, : int(marks.argmax(axis=1).max()) + 1])
        return self._sessions["text"].run(None, {"tokens": tokens})[0]

    def class_weights(self, prompts: Sequence[Sequence[str]]) -> Array:
        """Average the embeddings of each class' prompts; returns float32 (classes, D), of length 1 each."""
        return _normalised(np.stack([self.embed_texts(list(texts)).mean(axis=0) for texts in prompts]))

    def classify(
        self, pictures: Iterable[Picture], labels: Sequence[str], *, prompt: str = "a photo of a {}."
    ) -> Array:
        """Compare pictures with labels.

        Args:
            pictures: As for `embed_images`.
            labels: Names of the classes.
            prompt: What is said of a class; `{}` is its name.

        Returns:
            float32 (n, classes): probabilities, the softmax of the scaled cosine similarities.

        Raises:
            DataError: For no labels.
        """
        if not labels:
            raise DataError("expected at least one label to compare pictures with")
        weights = self.class_weights([[prompt.format(label)] for label in labels])
        scores = math.exp(self.content["logit_scale"]) * (self.embed_images(pictures) @ weights.T)
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        return scores / scores.sum(axis=1, keepdims=True)  # type: ignore[no-any-return]

    def _nothing(self) -> Array:
        return np.zeros((0, self.content["embedding_size"]), dtype=np.float32)


def load(folder: Path | str, *, threads: int | None = None, exact: bool = True) -> IntegerCLIP:
    """Load an export.

    Args:
        folder: Written by `lit-clipq export`.
        threads: Of one product; `None` leaves it to ONNX Runtime.
        exact: Whether products are kept from saturating on CPUs without VNNI, at some cost.

    Raises:
        ModelError: For a folder that is no export, or files that were edited or cut short.
        ConfigError: For a missing package, or `exact=False` on a CPU on which products would saturate.

    Example:
        `load("clip-int8").classify(["cat.jpg"], ["cat", "dog"])`
    """
    folder = Path(folder)
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}; leave them out for as many as there are cores")
    content = read_export(folder)
    if not exact and content["saturates_without_exact_mode"] and not multiplies_exactly():
        raise ConfigError(
            f"products of {folder} would saturate on this CPU ({', '.join(cpu_flags()) or 'flags unknown'}; no VNNI); "
            "leave exact=True, or export a model with 7-bit weights"
        )
    sessions = {name: _opened_tower(folder / file, threads, exact) for name, file in TOWER_FILES.items()}
    told = content["tokenizer"]
    tokenizer = None
    try:
        transform = ImageTransform.from_json(json.loads((folder / PREPROCESS_FILE).read_text(encoding="utf-8")))
        if told["reason"] is None:
            tokenizer = Tokenizer(folder / TOKENIZER_FILE, told["context_length"], told["special"], told["clean"])
    except LitClipqError:
        raise
    except Exception as error:  # the tokenizers package raises nothing more special
        raise ModelError(f"the export in {folder} is damaged ({error}); export the model again") from error
    return IntegerCLIP(content, sessions, transform, tokenizer)


def _opened_tower(file: Path, threads: int | None, exact: bool) -> Session:
    try:
        session: Session = open_session(file, threads=threads, exact=exact)
    except LitClipqError:
        raise
    except Exception as error:  # ONNX Runtime has a class for each of its states, in no public module
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{file} cannot be opened by ONNX Runtime ({reason}); export the model again") from error
    return session


def _opened(picture: Picture) -> Image.Image:
    return picture if isinstance(picture, Image.Image) else load_rgb(picture)


def _normalised(x: Array) -> Array:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)  # type: ignore[no-any-return]


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
