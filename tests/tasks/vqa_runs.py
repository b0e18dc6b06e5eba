"""A tiny VQA v2 on disk that can be learned, and trainings on it; importable by processes that tests start."""

import json
import os
import signal
import sys
from pathlib import Path

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from PIL import Image

from datamodules import VQAv2
from lit_clipq.features import CacheOptions
from lit_clipq.tasks import VQA
from lit_clipq.trainer import QuantTrainer

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 220)}
HEAD = {"layers": 1, "hidden": 32, "heads": 2, "feed_forward": 48, "flat_hidden": 8, "flat_out": 24}
PICTURES = {"train": 12, "val": 6}
FIRST_IMAGE = {"train": 1, "val": 501}


def write_data(root, flip=False):
    """Pictures of one colour, three questions each; the truth is the picture, and with `flip` another."""
    for split, count in PICTURES.items():
        folder = root / f"{split}2014"
        folder.mkdir(parents=True)
        asked, answered = [], []
        for i in range(count):
            image_id = FIRST_IMAGE[split] + i
            colour = list(COLOURS)[(i + flip) % 3]
            pixels = np.full((64, 64, 3), COLOURS[list(COLOURS)[i % 3]], np.uint8)
            pixels[: 8 + i] = 128
            Image.fromarray(pixels).save(folder / f"COCO_{split}2014_{image_id:012}.jpg", quality=95)
            questions = (
                ("What color is it?", "other", colour, "what color is"),
                ("Is it red?", "yes/no", "yes" if colour == "red" else "no", "is it"),
                ("How many colors are there in this picture?", "number", "2", "how many"),
            )
            for k, (text, kind, truth, first) in enumerate(questions):
                key = {"image_id": image_id, "question_id": image_id * 1000 + k}
                asked.append({**key, "question": text})
                said = [truth] * 9 + ["grey"]
                answers = [{"answer": a, "answer_confidence": "yes", "answer_id": n + 1} for n, a in enumerate(said)]
                kinds = {"answer_type": kind, "question_type": first, "multiple_choice_answer": truth}
                answered.append({**key, **kinds, "answers": answers})
        for name, rows in (("OpenEnded_mscoco", {"questions": asked}), ("mscoco", {"annotations": answered})):
            (root / f"v2_{name}_{split}2014_{next(iter(rows))}.json").write_text(json.dumps(rows))
    return root


def make_data(root, **options):
    return VQAv2(str(root), **{"min_answer_count": 1, "batch_size": 5, "train_batch_size": 6, "seed": 3, **options})


def make_task(folder, dropout=0.1, **options):
    lightning.seed_everything(7, verbose=False)
    options = {"pretrained": "mini", "head": "mini", "learning_rate": 2e-3, "warmup": (0.5,), **options}
    head_options = {**HEAD, "dropout": dropout, **options.pop("head_options", {})}
    cache = options.pop("cache", CacheOptions(folder=str(folder)))
    return VQA("mini-vit", head_options=head_options, cache=cache, **options)


class Losses(Callback):
    """Keeps the loss of every step, averaged over processes; may kill this process after some."""

    def __init__(self, kill_after=None):
        self.kill_after = kill_after
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):  # noqa: ARG002 Lightning's signature
        self.values.append(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean").item())
        if self.kill_after is not None and trainer.global_step == self.kill_after:
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)


def make_trainer(folder, *callbacks, save=False, **options):
    savers = [ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)] if save else []
    return QuantTrainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": folder,
            "results": str(Path(folder) / "results.json"),
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            "logger": False,
            "enable_checkpointing": save,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "deterministic": True,
            "callbacks": [*savers, *callbacks],
            "max_epochs": 3,
            **options,
        }
    )


def fit(root, folder, *callbacks, ckpt_path=None, data=None, task=None, save=False, **options):
    """Train and return (task, losses, trainer)."""
    losses = Losses(**{"kill_after": options.pop("kill_after", None)})
    task = task or make_task(Path(folder) / "cache")
    run = make_trainer(folder, *callbacks, losses, save=save, **options)
    run.fit(task, datamodule=data or make_data(root), ckpt_path=ckpt_path)
    return task, losses.values, run


def weights(task):
    return {name: value.clone() for name, value in task.head.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


if __name__ == "__main__":  # a training that kills itself
    torch.set_num_threads(int(sys.argv[4]))  # sums depend on it
    fit(Path(sys.argv[1]), Path(sys.argv[2]), save=True, kill_after=int(sys.argv[3]))
