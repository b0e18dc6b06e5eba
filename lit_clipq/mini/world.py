"""The mini world on disk: COCO captions, class folders and VQA v2 questions, the same to the bit on every machine.

`ensure_world` writes it on first use. The world is frozen: `WORLD_HASHES` records what every machine must arrive at.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from PIL import Image

from lit_clipq.errors import ConfigError, DataError
from lit_clipq.mini.captions import CAPTIONS_PER_IMAGE, captions
from lit_clipq.mini.questions import Question, questions
from lit_clipq.mini.render import IMAGE_SIZE, render
from lit_clipq.mini.rng import Rng
from lit_clipq.mini.scene import Scene, crowd, portrait
from lit_clipq.mini.shapes import SHAPES
from lit_clipq.paths import cache_dir

logger = logging.getLogger(__name__)

WORLD_SEED = 20261123
FORMAT = 1
QUESTIONS_PER_IMAGE = 3
CLASS_NAMES: tuple[str, ...] = tuple(sorted(SHAPES))
"""Names of the classification set, in label order."""

_CHUNK = 256  # pictures per task of a worker
_FIRST_IMAGE_ID = {"val": 1, "calibration": 1_000_001, "train": 2_000_001, "dev": 3_000_001}


@dataclass(frozen=True)
class Preset:
    """How many pictures of each kind a world holds."""

    captioned: dict[str, int]
    """Captioned pictures by split."""
    questioned: dict[str, int]
    """How many of them, from the first on, have questions."""
    per_class: dict[str, int]
    """Pictures of each class by split of the classification set."""


PRESETS: dict[str, Preset] = {
    "small": Preset({"val": 500, "calibration": 128}, {"val": 500, "calibration": 128}, {"val": 20, "calibration": 6}),
    "full": Preset(
        {"val": 2500, "calibration": 512}, {"val": 2500, "calibration": 512}, {"val": 100, "calibration": 16}
    ),
    "train": Preset({"train": 32768, "dev": 500}, {"train": 6000}, {}),
}
"""`small` is the beginning of `full`; `train` shares no picture with them."""

WORLD_HASHES: dict[str, str] = {
    "small": "01855d7e2ee11a0ace68775204d26350387b1968382157f12c96ebb68f5ac0c3",
    "full": "df47c935b52860076c474a7cf1711bd5571c7278af370c357cf0c3be5c7156cf",
    "train": "37a2754a82885cdf16de5a8fe2902ab28ab67a447e6fd3e3f5e8c387c51ed342",
}
"""SHA-256 over decoded pixels and annotation files of each preset."""


def scene_of(split: str, index: int) -> tuple[Scene, bool]:
    """Return the scene of a captioned picture, and whether it is a portrait of one thing.

    Of the training pictures 45 % are portraits, all others are crowds.
    """
    rng = Rng(WORLD_SEED, split, index, "scene")
    is_portrait = split == "train" and rng.percent(45)
    return (portrait(rng) if is_portrait else crowd(rng)), is_portrait


def class_scene_of(split: str, label: int, index: int) -> Scene:
    """Return the scene of a picture of the classification set."""
    return portrait(Rng(WORLD_SEED, "class", split, label, index, "scene"), CLASS_NAMES[label])


def picture(split: str, index: int) -> np.ndarray:
    """Return a captioned picture, uint8 `(64, 64, 3)`."""
    return render(scene_of(split, index)[0], Rng(WORLD_SEED, split, index, "pixels"))


def picture_captions(split: str, index: int) -> list[str]:
    """Return the five captions of a picture."""
    scene, is_portrait = scene_of(split, index)
    return captions(scene, Rng(WORLD_SEED, split, index, "captions"), portrait=is_portrait)


def picture_questions(split: str, index: int) -> list[Question]:
    """Return the questions about a picture."""
    return questions(scene_of(split, index)[0], Rng(WORLD_SEED, split, index, "questions"), QUESTIONS_PER_IMAGE)


def _save(pixels: np.ndarray, path: Path) -> str:
    """Write a PNG and return the SHA-256 of its pixels; how the file is compressed does not matter."""
    Image.fromarray(pixels).save(path, compress_level=1)
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def _write_captioned(folder: Path, split: str, start: int, stop: int) -> list[str]:
    return [_save(picture(split, i), folder / _file_name(split, i)) for i in range(start, stop)]


def _write_class(folder: Path, split: str, count: int, label: int) -> list[str]:
    target = folder / CLASS_NAMES[label]
    target.mkdir(parents=True)
    return [
        _save(
            render(class_scene_of(split, label, i), Rng(WORLD_SEED, "class", split, label, i, "pixels")),
            target / f"{CLASS_NAMES[label]}_{i:04d}.png",
        )
        for i in range(count)
    ]


def _file_name(split: str, index: int) -> str:
    return f"{split}_{index:06d}.png"


def caption_annotations(split: str, count: int) -> dict[str, Any]:
    """Return the captions of the first `count` pictures of a split in the layout of COCO."""
    first = _FIRST_IMAGE_ID[split]
    images = [
        {"id": first + i, "file_name": _file_name(split, i), "width": IMAGE_SIZE, "height": IMAGE_SIZE}
        for i in range(count)
    ]
    texts = ((first + i, j, text) for i in range(count) for j, text in enumerate(picture_captions(split, i)))
    annotations = [
        {"id": (image_id - 1) * CAPTIONS_PER_IMAGE + j + 1, "image_id": image_id, "caption": text}
        for image_id, j, text in texts
    ]
    return {"info": _info(split), "licenses": [], "images": images, "annotations": annotations}


def _info(split: str) -> dict[str, Any]:
    return {"description": "lit_clipq mini world", "version": str(FORMAT), "seed": WORLD_SEED, "split": split}


def vqa_annotations(split: str, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return question file and annotation file for the first `count` pictures in the layout of VQA v2."""
    asked: list[dict[str, Any]] = []
    answered: list[dict[str, Any]] = []
    for i in range(count):
        image_id = _FIRST_IMAGE_ID[split] + i
        for j, question in enumerate(picture_questions(split, i)):
            question_id = image_id * 1000 + j
            asked.append({"image_id": image_id, "question": question.text, "question_id": question_id})
            answered.append(_vqa_annotation(image_id, question_id, question))
    shared = {"info": _info(split), "license": {}, "data_type": "mini", "data_subtype": split}
    return {**shared, "task_type": "Open-Ended", "questions": asked}, {**shared, "annotations": answered}


def _vqa_annotation(image_id: int, question_id: int, question: Question) -> dict[str, Any]:
    votes = question.answers
    said = zip(votes, question.confidences, strict=True)
    return {
        "image_id": image_id,
        "question_id": question_id,
        "question_type": question.kind,
        "answer_type": question.answer_type,
        "multiple_choice_answer": max(votes, key=lambda answer: (votes.count(answer), -votes.index(answer))),
        "answers": [
            {"answer": answer, "answer_confidence": confidence, "answer_id": k + 1}
            for k, (answer, confidence) in enumerate(said)
        ],
    }


def _write_json(path: Path, content: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps(content, separators=(",", ":"), sort_keys=True, ensure_ascii=True).encode("ascii")
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def _write_annotations(folder: Path, preset: Preset) -> Iterator[str]:
    for split, count in preset.captioned.items():
        yield _write_json(folder / "annotations" / f"captions_{split}.json", caption_annotations(split, count))
    for split, count in preset.questioned.items():
        asked, answered = vqa_annotations(split, count)
        yield _write_json(folder / "vqa" / f"v2_OpenEnded_mini_{split}_questions.json", asked)
        yield _write_json(folder / "vqa" / f"v2_mini_{split}_annotations.json", answered)
    for split in preset.per_class:
        yield _write_json(folder / "classification" / split / "classes.json", {n: n for n in CLASS_NAMES})


def _picture_jobs(folder: Path, preset: Preset) -> list[partial[list[str]]]:
    jobs = [
        partial(_write_captioned, folder / "images", split, start, min(count, start + _CHUNK))
        for split, count in preset.captioned.items()
        for start in range(0, count, _CHUNK)
    ]
    jobs += [
        partial(_write_class, folder / "classification" / split, split, count, label)
        for split, count in preset.per_class.items()
        for label in range(len(CLASS_NAMES))
    ]
    return jobs


def _run(job: partial[list[str]]) -> list[str]:
    return job()


def write_world(folder: Path, preset: str, workers: int = 1) -> str:
    """Write a world into an empty folder.

    Args:
        folder: where to write; must exist.
        preset: a name in `PRESETS`.
        workers: processes that draw.

    Returns:
        The hash of the world: SHA-256 over the digests of all pictures' pixels and all annotation files, in order.
    """
    options = PRESETS[preset]
    (folder / "images").mkdir()
    jobs = _picture_jobs(folder, options)
    if workers == 1:
        digests = [digest for job in jobs for digest in job()]
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            digests = [digest for chunk in pool.map(_run, jobs) for digest in chunk]
    digests.extend(_write_annotations(folder, options))
    return hashlib.sha256("\n".join(digests).encode("ascii")).hexdigest()


def _check(folder: Path, preset: str) -> None:
    """Refuse a folder that is not the recorded world.

    Raises:
        DataError: no readable manifest, another world, or pictures that are missing.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"expected a mini world in {folder}, but its manifest.json cannot be read ({error}); "
            "delete the folder and it is written again, or give another --data.root."
        ) from error
    if manifest.get("hash") != WORLD_HASHES[preset]:
        raise DataError(
            f"expected the mini world '{preset}' with hash {WORLD_HASHES[preset][:12]} in {folder}, got "
            f"{str(manifest.get('hash'))[:12]}; delete the folder and it is written again, or give another --data.root."
        )
    pictures = sum(1 for _ in folder.rglob("*.png"))
    if pictures != manifest["pictures"]:
        raise DataError(
            f"expected {manifest['pictures']} pictures in the mini world {folder}, got {pictures}; "
            "delete the folder and it is written again."
        )


def world_folder(root: str | Path | None, preset: str) -> Path:
    """Return where a world lies or will lie: `<root>/<preset>`, in `mini` of the cache folder without a root.

    Raises:
        ConfigError: an unknown preset.
    """
    if preset not in PRESETS:
        raise ConfigError(f"expected a mini preset out of {', '.join(PRESETS)}, got {preset!r}.")
    base = cache_dir() / "mini" if root is None else Path(root).expanduser()
    return base / preset


def ensure_world(root: Path | None = None, preset: str = "small", workers: int = 1) -> Path:
    """Return the folder of a world, written first where it is absent.

    Several processes may ask at once: one writes, the others wait; a folder appears complete or not at all.

    Args:
        root: folder of worlds; None for `mini` in the cache folder.
        preset: `small` (500 evaluation pictures), `full` (2,500) or `train`.
        workers: processes that draw.

    Returns:
        `<root>/<preset>` with `images/`, `annotations/captions_<split>.json`, `classification/<split>/<class>/`,
        `vqa/v2_OpenEnded_mini_<split>_questions.json`, `vqa/v2_mini_<split>_annotations.json` and `manifest.json`.

    Raises:
        ConfigError: an unknown preset.
        DataError: the folder cannot be written or holds something else, or this machine draws other pixels than
            recorded.
    """
    folder = world_folder(root, preset)
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.parent / f".{preset}.lock"):
                if not folder.exists():
                    _create(folder, preset, workers)
        except OSError as error:
            raise DataError(
                f"the mini world '{preset}' cannot be written to {folder} ({error}); "
                "give another --data.root, or another cache folder in LIT_CLIPQ_CACHE."
            ) from error
    _check(folder, preset)
    return folder


def _create(folder: Path, preset: str, workers: int) -> None:
    logger.info("writing the mini world '%s' to %s", preset, folder)
    for killed in folder.parent.glob(f".{preset}-*"):  # nobody else writes here while the lock is held
        shutil.rmtree(killed, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{preset}-", dir=folder.parent))
    try:
        digest = write_world(temporary, preset, workers)
        if digest != WORLD_HASHES[preset]:
            raise DataError(
                f"expected the mini world '{preset}' to have the hash {WORLD_HASHES[preset][:12]}, but this machine "
                f"made {digest[:12]}; please report it together with the versions of numpy and pillow."
            )
        manifest = {
            "format": FORMAT,
            "preset": preset,
            "seed": WORLD_SEED,
            "hash": digest,
            "pictures": sum(1 for _ in temporary.rglob("*.png")),
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
