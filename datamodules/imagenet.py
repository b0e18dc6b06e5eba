"""ImageNetV2, ImageNet and other folders of classes, for classification, zero-shot or supervised."""

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from datamodules.captions import find_folder, read_json
from datamodules.datamodule import QuantDataModule, task_of
from datamodules.download import IMAGENET_V2, Archive
from datamodules.images import Picture, by_composition, composed, describe_unread, list_pictures
from lit_clipq.contracts import ClassData, NamedSamples, OffersTemplates
from lit_clipq.errors import ConfigError, DataError

WNID = re.compile(r"n\d{8}")
V2_FOLDER = "imagenetv2-matched-frequency-format-val"


class ClassificationDataModule(QuantDataModule):
    """Pictures in class folders.

    Calibration pairs pictures with prompts of classes drawn by the seed; the folder of a picture, which is its label,
    plays no part.

    Args:
        root: Folder of the class folders.
        templates: Prompts of the calibration texts, with {} for the class name; by default those of the task
            in the trainer, or "a photo of a {}." without one.
        **kwargs: See `QuantDataModule`.

    Raises:
        ConfigError: A template without a place for the class name.
    """

    def __init__(self, root: str, templates: list[str] | None = None, **kwargs: Any) -> None:
        super().__init__(root=root, **kwargs)
        if templates is not None and not (templates and all("{}" in text for text in templates)):
            raise ConfigError(f"--data.templates needs templates with {{}} for the class name, got {templates}.")
        self.templates = templates
        self.class_names: list[str] = []

    @abstractmethod
    def read_classes(self) -> tuple[list[str], dict[str, int]]:
        """Return the class names in label order, and folder name -> label."""

    @abstractmethod
    def evaluation_folder(self) -> Path:
        """Return the folder that holds the class folders."""

    def setup(self, stage: str | None = None) -> None:
        """Check the class folders and the pictures.

        Raises:
            DataError: Absent, damaged or contradictory data.
        """
        super().setup(stage)
        if not self.class_names:
            self.class_names, _ = self.read_classes()
        if self.templates is None:
            task = task_of(self)
            offered = task.templates if isinstance(task, OffersTemplates) else None
            self.templates = None if offered is None else list(offered)

    def read_evaluation(self) -> list[Picture]:
        """List the pictures of all class folders, class by class.

        Raises:
            DataError: A class folder without pictures.
        """
        _, labels = self.read_classes()
        pictures = []
        for name, label in sorted(labels.items(), key=lambda item: item[1]):
            others: Counter[str] = Counter()
            found = list_pictures(self.evaluation_folder() / name, others)
            self.unread.update(others)
            if not found and self.on_error == "raise":
                told = f" (but files that are not read: {describe_unread(others)})" if others else ""
                raise DataError(
                    f"Class folder {self.evaluation_folder() / name} holds no pictures{told}; fill or remove it, "
                    "or pass --data.on_error skip."
                )
            pictures += [Picture(path, label=label) for path in found]
        return pictures

    def read_train(self) -> list[Picture]:
        """No train pictures."""
        return []

    def read_folder(self, folder: Path) -> list[Picture]:
        """List all pictures below a calibration folder."""
        return [Picture(path) for path in list_pictures(folder)]

    def calibration_texts(self, pictures: Sequence[Picture], seed: int) -> Tensor | None:
        """Return one tokenised prompt per picture; class and template are drawn by `seed` alone.

        A task that offers no templates reads no texts: then there are none.
        """
        if self.templates is not None and not self.templates:
            return None
        templates = self.templates or ["a photo of a {}."]
        generator = torch.Generator().manual_seed(seed)
        classes = torch.randint(len(self.class_names), (len(pictures),), generator=generator).tolist()
        chosen = torch.randint(len(templates), (len(pictures),), generator=generator).tolist()
        prompts = [templates[t].replace("{}", self.class_names[c]) for c, t in zip(classes, chosen, strict=True)]
        return self.checked_preprocessing().tokenizer(prompts)

    def picture_file(self, image_id: int) -> Path:
        """Return the file of an evaluated picture."""
        return self.pictures[image_id].path

    def text_of(self, text_id: int) -> str:
        """Return the name of a class."""
        return self.class_names[text_id]

    def sample_counts(self) -> dict[str, int]:
        """Return the counts of pictures and classes."""
        return {**super().sample_counts(), "classes": len(self.class_names)}

    def options(self) -> dict[str, Any]:
        """Add the class names."""
        return {**super().options(), "class_names": self.class_names}


if TYPE_CHECKING:

    def _fulfils(data: ClassificationDataModule) -> tuple[ClassData, NamedSamples]:
        """Let the type checker hold the class against its contracts."""
        return data, data


class ImageNetV2(ClassificationDataModule):
    """ImageNetV2 matched-frequency: 10,000 pictures in folders named 0 .. 999 by class index.

    There are no other pictures of its kind: without `calibration_root` a slice leaves the evaluation.

    Args:
        root: Folder of the class folders, or the one above it.
        **kwargs: See `ClassificationDataModule` and `QuantDataModule`.
    """

    def __init__(self, root: str, **kwargs: Any) -> None:
        super().__init__(root=root, **kwargs)

    def archives(self) -> tuple[Archive, ...]:
        """The official archive."""
        return (IMAGENET_V2,)

    def absent(self) -> str | None:
        """Say where the class folders are expected."""
        if _folders(self.evaluation_folder()):
            return None
        return (
            f"ImageNetV2 needs {V2_FOLDER}/ with folders 0 .. 999 in {self.root.absolute()}, but it is absent. "
            f"Set --data.root, or unpack {IMAGENET_V2.url} there (--data.download true does it)."
        )

    def evaluation_folder(self) -> Path:
        """Return the folder of the archive below the root, or the root."""
        return find_folder(self.root, [V2_FOLDER])

    def read_classes(self) -> tuple[list[str], dict[str, int]]:
        """Return ImageNet's class names, and the integer that each folder is named by.

        Raises:
            DataError: A folder that is not named by an integer 0 .. 999, or two for one class.
        """
        names = imagenet_class_names()
        folders = _folders(self.evaluation_folder())
        odd = [name for name in folders if not (name.isascii() and name.isdigit() and int(name) < len(names))]
        labels = {name: int(name) for name in folders if name not in odd}
        if odd or len(set(labels.values())) < len(labels):
            raise DataError(
                f"{self.evaluation_folder()} has the folder {(odd or sorted(labels))[0]!r}; expected one folder per "
                f"class, named 0 .. {len(names) - 1} by class index."
            )
        return names, labels


class ImageFolderClassification(ClassificationDataModule):
    """A folder per class: ImageNet's val folders named by wnid, or any folders with a `classes.json`.

    Folders named like `n01440764` are ImageNet-1k classes; the evaluation may have any part of the 1,000, the
    classifier always has all of them. Otherwise `classes.json`, in the folder or the one above, gives the class names:
    `{"folder": "name", ...}`, or a list of names for folders named 0, 1, ... Where `root` has the folders `val` and
    `train`, val is evaluated and train calibrates.

    Args:
        root: Folder of the class folders, or the one above `val` and `train`.
        **kwargs: See `ClassificationDataModule` and `QuantDataModule`.
    """

    def __init__(self, root: str, **kwargs: Any) -> None:
        super().__init__(root=root, **kwargs)

    def absent(self) -> str | None:
        """Say where the class folders are expected."""
        if _folders(self.evaluation_folder()):
            return None
        return (
            f"Classification needs a folder per class in {self.evaluation_folder().absolute()}, but there is none. Set "
            "--data.root; ImageNet's ILSVRC2012_img_val.tar is given out at https://image-net.org/download.php and has "
            "to be sorted into folders named by wnid (n01440764/ ...)."
        )

    def evaluation_folder(self) -> Path:
        """Return `val` below the root, or the root."""
        return find_folder(self.root, ["val"])

    def read_classes(self) -> tuple[list[str], dict[str, int]]:
        """Return class names and folder name -> label, from `classes.json` or from ImageNet's wnids.

        Raises:
            DataError: Folders that belong to no class.
        """
        folder = self.evaluation_folder()
        folders = _folders(folder)
        file = next(
            (path for path in (folder / "classes.json", folder.parent / "classes.json") if path.is_file()), None
        )
        if file is not None:
            names, labels = _classes_from_json(file)
        elif all(WNID.fullmatch(name) for name in folders):
            names, labels = imagenet_class_names(), {wnid: label for label, wnid in enumerate(imagenet_wnids())}
            file = Path("ImageNet-1k")
        else:
            odd = next(name for name in folders if not WNID.fullmatch(name))
            raise DataError(
                f"{folder} has the folder {odd!r}, which is no ImageNet wnid (n01440764); name the folders by wnid, or "
                f"put {folder / 'classes.json'} there: {{folder: class name}}."
            )
        known = by_composition(labels)  # a file system may decompose the letters of a folder's name
        found = {name: known.get(name, known.get(composed(name))) for name in folders}
        unknown = [name for name, key in found.items() if key is None]
        if unknown:
            raise DataError(f"{folder} has {len(unknown)} folders that are no class of {file}, e.g. {unknown[0]!r}.")
        return names, {name: labels[key] for name, key in found.items() if key is not None}

    def read_train(self) -> list[Picture]:
        """List the pictures of `train` beside `val`, without their labels."""
        train = self.root / "train"
        return self.read_folder(train) if self.evaluation_folder() != self.root and train.is_dir() else []


def imagenet_class_names() -> list[str]:
    """Return OpenAI's 1,000 class names in class order, from open_clip."""
    from open_clip import IMAGENET_CLASSNAMES

    return list(IMAGENET_CLASSNAMES)


def imagenet_wnids() -> list[str]:
    """Return the 1,000 wnids of ImageNet-1k in class order, which is their sorted order, from timm."""
    from timm.data import ImageNetInfo

    return list(ImageNetInfo("imagenet-1k").label_names())


def _folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, hidden ones left out, sorted as strings."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _classes_from_json(file: Path) -> tuple[list[str], dict[str, int]]:
    content = read_json(file)
    if isinstance(content, list):
        content = {str(index): name for index, name in enumerate(content)}
    if not isinstance(content, dict) or not content or not all(isinstance(name, str) for name in content.values()):
        raise DataError(f"{file} must map folders to class names, {{folder: name}}, or list the names.")
    return list(content.values()), {folder: label for label, folder in enumerate(content)}
