"""A CLIP small enough to check by hand, data for it, and a Trainer that only evaluates."""

import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lit_clipq.models import LoadedCLIP, Preprocessing
from lit_clipq.tasks import task

CONTEXT, VOCABULARY, DIM = 16, 40, 6
CLASSES = ["ant", "bee", "long cat", "dog", "bee"]  # two classes with the same name tie


class FakeCLIP(nn.Module):
    """Linear image tower, bag-of-tokens text tower."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.image = nn.Parameter(torch.randn(12, DIM, generator=generator))
        self.token = nn.Parameter(torch.randn(VOCABULARY, DIM, generator=generator))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.texts_seen = []

    def encode_image(self, images, normalize=False):  # noqa: ARG002 open_clip's signature
        return images.flatten(1) @ self.image

    def encode_text(self, tokens, normalize=False):  # noqa: ARG002 open_clip's signature
        self.texts_seen += tokens.tolist()
        return self.token[tokens].mul(tokens[..., None] > 0).sum(1)


def tokenize(texts, context_length=CONTEXT):
    """One token per character."""
    tokens = torch.zeros(len(texts), context_length, dtype=torch.int64)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = torch.tensor([ord(letter) % (VOCABULARY - 1) + 1 for letter in text[:context_length]])
    return tokens


def fake_load_clip(name, pretrained=None, **kwargs):
    return LoadedCLIP(FakeCLIP(), Preprocessing(lambda image: image, tokenize, CONTEXT, "fake"), name, pretrained)


def make_task(kind, *args, **kwargs):
    """A task around a fake CLIP; works in spawned processes too."""
    real, task.load_clip = task.load_clip, fake_load_clip
    try:
        return kind("fake", *args, **kwargs)
    finally:
        task.load_clip = real


def trainer(folder, **kwargs):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        use_distributed_sampler=False,
        enable_model_summary=False,
        **quiet,
        **kwargs,
    )


class Shards(LightningDataModule):
    """Loaders of the samples that a rule gives to this process."""

    def __init__(self, loaders, owners=None):
        super().__init__()
        self.loaders = loaders  # list of lists of samples
        self.owners = owners  # per loader, the rank of each sample; None: all here

    def val_dataloader(self):
        rank = dist.get_rank() if dist.is_initialized() else 0
        return [
            DataLoader(
                [s for j, s in enumerate(samples) if self.owners is None or self.owners[i][j] == rank],
                batch_size=3,
                collate_fn=collate,
            )
            for i, samples in enumerate(self.loaders)
        ]

    test_dataloader = val_dataloader


def collate(samples):
    """Stack every key but `pairs`, whose rows are joined."""
    return {
        key: torch.cat([s[key] for s in samples]) if key == "pairs" else torch.stack([s[key] for s in samples])
        for key in samples[0]
    }


def retrieval_samples(images=5, texts=9):
    """Pictures with ids 10, 11, ...; text 0 belongs to two of them, text 1 twice to the same."""
    generator = torch.Generator().manual_seed(1)
    pictures = [
        {"images": torch.randn(3, 2, 2, generator=generator), "image_ids": torch.tensor(10 + i)} for i in range(images)
    ]
    owners = {t: [t % images] for t in range(texts)} | {0: [0, 1], 1: [1, 1]}
    captions = [
        {
            "texts": torch.randint(1, VOCABULARY, (CONTEXT,), generator=generator),
            "text_ids": torch.tensor(t),
            "pairs": torch.tensor([[t, 10 + owner] for owner in owners[t]]),
        }
        for t in range(texts)
    ]
    return [pictures, captions]


def classification_samples(images=8):
    generator = torch.Generator().manual_seed(2)
    return [
        [
            {
                "images": torch.randn(3, 2, 2, generator=generator),
                "labels": torch.tensor(i % len(CLASSES)),
                "image_ids": torch.tensor(70 - i),
            }
            for i in range(images)
        ]
    ]


def classification_data(owners=None):
    data = Shards(classification_samples(), owners)
    data.class_names = CLASSES
    return data
