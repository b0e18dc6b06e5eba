"""Captioning under a Trainer: one caption a picture, kept on disk, continued, scored; and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lit_clipq.cli import main
from lit_clipq.errors import ConfigError, DataError, ModelError
from lit_clipq.metrics import CIDEr
from lit_clipq.tasks import Captioning
from lit_clipq.tasks.caption_log import CaptionLog
from tests.ddp.processes import run_processes
from tests.tasks.fakes import Shards, trainer

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "mini"
QUICK = {"preset": "mini", "beams": 1, "candidates": 8, "iterations": 1, "max_tokens": 4}
RUN = ["validate", "--config", str(CONFIGS / "captioning.yaml"), "--data.limit", "6", "--model.beams", "1"]
RUN += ["--model.candidates", "8", "--model.iterations", "1", "--model.max_tokens", "4"]
RUN += ["--quantize.recipe", "vanilla", "--quantize.calibration_samples", "8", "--trainer.enable_progress_bar", "false"]


class Captions(Shards):
    """Six pictures with two references each."""

    def __init__(self, owners=None):
        generator = torch.Generator().manual_seed(3)
        samples = [
            {
                "images": torch.randn(3, 64, 64, generator=generator),
                "image_ids": torch.tensor(90 - i),
                "references": ["a red star above a fish", f"{word} fish on grass"],
                "file_names": f"{i}.png",
            }
            for i, word in enumerate(("one", "two", "three", "red", "blue", "a"))
        ]
        super().__init__([samples], owners)

    def val_dataloader(self):
        (loader,) = super().val_dataloader()
        return torch.utils.data.DataLoader(loader.dataset, batch_size=4, collate_fn=collate)


def collate(samples):
    stacked = {key: torch.stack([s[key] for s in samples]) for key in ("images", "image_ids")}
    return {**stacked, **{key: [s[key] for s in samples] for key in ("references", "file_names")}}


def make_task(**options):
    return Captioning("mini-vit", "mini", **{**QUICK, **options})


def evaluate(folder, devices=1, owners=None, task=None, path=None, resume=False):
    task = task or make_task()
    if path is not None:
        task.begin_pass(path, "run", resume=resume)
    trainer(folder, devices=devices).validate(task, datamodule=Captions(owners), verbose=False)
    return task


def outcome(task):
    scores = {name: score.values.tolist() for name, score in task.sample_scores().items()}
    return task.results(), scores, dict(sorted(task.captioned().items()))


def on_rank(rank, folder, plans):
    return [outcome(evaluate(folder, 2, [plan], path=folder / "captions.json")) for plan in plans]


def test_one_caption_a_picture_and_their_cider(tmp_path):
    task = evaluate(tmp_path)
    pictures = task.captioned()
    assert sorted(pictures) == [85, 86, 87, 88, 89, 90]
    assert all(picture.caption for picture in pictures.values())
    metric = CIDEr()
    ids = list(pictures)
    metric.update([pictures[i].caption for i in ids], [pictures[i].references for i in ids], torch.tensor(ids))
    assert task.results() == pytest.approx(metric.compute())
    assert task.sample_counts()["images"] == 6
    assert task.sample_scores()["cider"].clusters.tolist() == sorted(ids)


@pytest.mark.slow
def test_two_processes_give_the_captions_and_scores_of_one(tmp_path):
    plans = [[0, 1, 0, 1, 0, 1], [0] * 6]
    alone = outcome(evaluate(tmp_path))
    for outcomes in run_processes(on_rank, tmp_path, plans, timeout=150):
        for found in outcomes:
            assert found == alone
    written = json.loads((tmp_path / "captions.json").read_text())
    assert {row["image_id"]: row["caption"] for row in written} == {k: p.caption for k, p in alone[2].items()}
    assert not list(tmp_path.glob("*.rank*"))


def test_an_interrupted_pass_goes_on_and_gives_the_same(tmp_path):
    whole = outcome(evaluate(tmp_path, path=tmp_path / "whole.json"))
    task, path = make_task(), tmp_path / "captions.json"
    seen = task.caption_images

    def interrupted(images):
        if len(images) < 4:
            raise KeyboardInterrupt
        return seen(images)

    task.caption_images = interrupted
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        evaluate(tmp_path, task=task, path=path)
    assert len(json.loads(path.with_suffix(".rank0.json").read_text())) == 4
    task, asked = make_task(), []
    seen_again = task.caption_images
    task.caption_images = lambda images: (asked.append(len(images)), seen_again(images))[1]
    assert outcome(evaluate(tmp_path, task=task, path=path, resume=True)) == whole
    assert asked == [2]
    assert path.read_text() == (tmp_path / "whole.json").read_text()


def test_captions_of_another_run_are_not_continued(tmp_path):
    path = tmp_path / "captions.json"
    log = CaptionLog(path, "one", resume=False)
    log.prepare()
    log.add({1: "a dog"})
    assert CaptionLog(path, "one", resume=True).open() == {1: "a dog"}
    with pytest.raises(ConfigError, match="another model, recipe, data or options; start without --resume"):
        CaptionLog(path, "two", resume=True).prepare()
    path.with_suffix(".rank0.json").write_text('[{"image_id": 1, "caption": ""}]')
    with pytest.raises(DataError, match="picture 1"):
        CaptionLog(path, "one", resume=True).open()
    CaptionLog(path, "two", resume=False).prepare()
    assert CaptionLog(path, "two", resume=True).open() == {}


@pytest.mark.slow
def test_resume_from_the_command_line_and_the_files_it_leaves(tmp_path, capsys):
    results = tmp_path / "results.json"
    assert main([*RUN, "--results", str(results)]) == 0
    first = {path.name: path.read_text() for path in tmp_path.glob("captions_*.json")}
    assert {"captions_float.json", "captions_quantized.json"} < set(first)
    page = (tmp_path / "captions.html").read_text()
    assert page.count("<img") == 6
    assert "CIDEr quantized (vanilla, W8A8): " in page
    lost = json.loads(first["captions_quantized.json"])[:2]
    (tmp_path / "captions_quantized.json").write_text(json.dumps(lost))
    assert main([*RUN, "--results", str(results), "--resume"]) == 0
    assert {path.name: path.read_text() for path in tmp_path.glob("captions_*.json")} == first
    assert main([*RUN, "--results", str(results), "--resume", "true", "--quantize.bits", "5"]) == 1
    assert "start without --resume" in capsys.readouterr().err


def test_resume_is_for_captions_only(tmp_path, capsys):
    run = ["validate", "--config", str(CONFIGS / "retrieval.yaml"), "--data.limit", "10", "--resume"]
    assert main([*run, "--results", str(tmp_path / "r.json")]) == 1
    assert "which Retrieval does not write" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_tokens": 0}, "--model.max_tokens must be at least 1, got 0"),
        ({"beams": 0}, "--model.beams must be at least 1"),
        ({"preset": "unknown"}, "--model.preset must be one of zerocap, magic, mini"),
        ({"options": {"clip_scal": 1.0}}, "did you mean 'clip_scale'"),
        ({"options": {"beams": 2}}, "the same option"),
        ({"options": {"temperature": 0.0}}, "temperature must be above 0"),
        ({"options": {"step_size": "abc"}}, "option step_size must be a finite number, got 'abc'"),
        ({"options": {"step_size": float("nan")}}, "option step_size must be a finite number, got nan"),
        ({"options": {"memo_megabytes": 1.5}}, "option memo_megabytes must be a whole number, got 1.5"),
        ({"options": {"start_token": 5}}, r"option start_token must be str \| None, got 5"),
        ({"forbidden_tokens": "absent.npy"}, "forbidden tokens cannot be read from absent.npy"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_impossible_options_are_refused(options, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=told):
        make_task(**options).caption_images(torch.zeros(1, 3, 64, 64))


def test_an_unknown_language_model_is_told_in_one_sentence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # ask no network
    with pytest.raises(ModelError, match=r"language model 'no/such-model' is neither a folder nor could it be fetched"):
        make_task(lm="no/such-model")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
        MemoryError(),
    ],
    ids=str,
)
def test_running_out_of_memory_names_the_knobs(error):
    task = make_task(beams=3)

    def fail(*args, **kwargs):
        raise error

    task.caption_images(torch.zeros(1, 3, 64, 64))
    task._captioner.captions = fail
    with pytest.raises(
        ConfigError, match=r"2 pictures x 3 beams x 8 candidates; lower --data.batch_size, --model.beams"
    ):
        task.caption_images(torch.zeros(2, 3, 64, 64))


def test_the_language_model_is_offered_where_a_pattern_speaks_of_it():
    task = make_task()
    batch = torch.zeros(2, 3, 64, 64), task.preprocessing.tokenizer(["a red star", "two fish on grass"])
    for include, offered in (((), False), (("clip.*",), False), (("clip.*", "lm.*"), True), (("*",), True)):
        task.offer_roots(include)
        assert ("lm" in task.roots()) == offered
        assert ("lm" in task.calibration_forward(batch)) == offered
    rows = task.calibration_forward(batch)["lm"]
    torch.testing.assert_close(rows.square().sum(-1), torch.full(rows.shape[:2], 4.0))
    assert isinstance(task.roots()["lm"], nn.Module)
    for row in range(2):  # whatever texts are beside it
        alone = task.calibration_forward((batch[0][row : row + 1], batch[1][row : row + 1]))["lm"]
        torch.testing.assert_close(rows[row : row + 1], alone)


@pytest.mark.slow
def test_a_quantized_language_model_still_captions_and_its_layers_are_in_the_map(tmp_path):
    results = tmp_path / "results.json"
    run = [*RUN, "--quantize.recipe", "ptq4clip", "--quantize.include", '["clip.visual.*", "lm.*"]']
    assert main([*run, "--results", str(results)]) == 0
    entries = {entry["name"]: entry for entry in json.loads(results.read_text())["map"]}
    for name in ("attn.qkv_proj", "attn.qk", "attn.av", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"):
        assert entries[f"lm.transformer.h.1.{name}"]["activation_bits"] == 8
        assert entries[f"lm.transformer.h.1.{name}"]["macs"] > 0
    assert entries["lm.lm_head"]["weight_bits"] == 8
    assert "products outside of layers" not in "".join(entries)
    assert len(json.loads((tmp_path / "captions_quantized.json").read_text())) == 6
    with_lm = json.loads(results.read_text())["size_bytes"]["float"]
    assert main([*RUN, "--results", str(results)]) == 0
    parameters = sum(p.numel() for p in make_task().clip.parameters())
    assert json.loads(results.read_text())["size_bytes"]["float"] < with_lm
    assert json.loads(results.read_text())["size_bytes"]["float"] >= 4 * parameters
