"""A preprocessing without a model, and small data sets written to disk."""

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

CONTEXT_LENGTH = 48


@dataclass(frozen=True)
class FakePreprocessing:
    """Pictures become 3 x 8 x 8, words become their CRC."""

    fingerprint: str = "fake"
    context_length: int = CONTEXT_LENGTH

    def image(self, picture: Image.Image) -> Tensor:
        assert picture.mode == "RGB"
        return torch.from_numpy(np.array(picture.resize((8, 8)))).permute(2, 0, 1) / 255

    def tokenizer(self, texts: list[str], context_length: int | None = None) -> Tensor:
        length = context_length or self.context_length
        tokens = torch.zeros(len(texts), length, dtype=torch.int64)
        for row, text in enumerate(texts):
            words = [zlib.crc32(word.encode()) + 3 for word in text.split()][: length - 2]
            tokens[row, : len(words) + 2] = torch.tensor([1, *words, 2])
        return tokens


@pytest.fixture
def preprocessing() -> FakePreprocessing:
    return FakePreprocessing()


@pytest.fixture(scope="session")
def draw() -> Callable[..., Path]:
    """Write a small noise picture whose content depends on the seed."""

    def write(path: Path, seed: int, size: tuple[int, int] = (24, 16)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        return path

    return write


@pytest.fixture
def coco(tmp_path: Path, draw: Callable[..., Path]) -> Callable[..., Path]:
    """Write a COCO folder: `val` pictures with `captions` captions each in val2017, `train` pictures in train2017."""

    def write(val: int = 20, train: int = 0, captions: int = 6) -> Path:
        root = tmp_path / "coco"
        for split, count, offset in (("val2017", val, 100), ("train2017", train, 5000)):
            if not count:
                continue
            images = [{"id": offset + i, "file_name": f"{split}_{i:03}.jpg"} for i in range(count)]
            # rows go round the pictures, so that file order and picture order differ
            rows = [
                {
                    "id": 7 * count * k + i,
                    "image_id": offset + i,
                    "caption": f" {split} picture {i}" + " very" * k + "\n",
                }
                for k in reversed(range(captions))
                for i in range(count)
            ]
            rows += [{"id": 10**6 + i, "image_id": offset + i, "caption": "shared text"} for i in range(min(count, 2))]
            (root / "annotations").mkdir(parents=True, exist_ok=True)
            (root / f"annotations/captions_{split}.json").write_text(
                json.dumps({"images": images, "annotations": rows})
            )
            for i, image in enumerate(images):
                draw(root / split / image["file_name"], offset + i)
        return root

    return write


@pytest.fixture
def karpathy(tmp_path: Path, draw: Callable[..., Path]) -> Path:
    """Write a Karpathy folder of COCO: 6 test, 4 restval and 3 train rows; the train pictures are absent."""
    root = tmp_path / "karpathy"
    rows = []
    for i, split in enumerate(["test"] * 6 + ["restval"] * 4 + ["train"] * 3):
        part = "train2014" if split == "train" else "val2014"
        name = f"COCO_{part}_{i:012}.jpg"
        count = 7 if i == 0 else 5
        sentences = [{"raw": f"{split} picture {i} caption {k} ", "tokens": []} for k in range(count)]
        rows.append({"filepath": part, "filename": name, "cocoid": i, "split": split, "sentences": sentences})
        if split != "train":
            draw(root / part / name, i)
    (root / "dataset_coco.json").write_text(json.dumps({"images": rows, "dataset": "coco"}))
    return root
