"""Zero-shot classification under a Trainer: the classifier, results, and what is refused."""

import pytest
import torch
from lightning.pytorch import Callback

from lit_clipq.errors import ConfigError, DataError
from lit_clipq.tasks import ZeroShotClassification
from tests.metrics import oracles
from tests.tasks.fakes import (
    CLASSES,
    CONTEXT,
    classification_data,
    classification_samples,
    collate,
    make_task,
    tokenize,
    trainer,
)

TEMPLATES = ["a {}", "{}", "the {}, a {}"]


def classifier_by_loops(clip):
    rows = []
    for name in CLASSES:
        total = torch.zeros(6, dtype=torch.float64)
        for template in TEMPLATES:
            embedding = clip.encode_text(tokenize([template.replace("{}", name)]))[0].double()
            total += embedding / embedding.norm()
        rows.append(total / total.norm())
    return torch.stack(rows)


@torch.no_grad()
def expected(task):
    batch = collate(classification_samples()[0])
    images = task.clip.encode_image(batch["images"]).double()
    logits = images @ classifier_by_loops(task.clip).T
    return oracles.topk(logits.round(decimals=9), batch["labels"], (1, 2))  # rounded: classes 1 and 4 tie


@pytest.fixture
def task():
    return make_task(ZeroShotClassification, templates=TEMPLATES, ks=(1, 2), text_batch_size=4)


def test_validate_agrees_with_loops(task, tmp_path):
    run = trainer(tmp_path)
    run.validate(task, datamodule=classification_data(), verbose=False)
    assert task.results() == pytest.approx(expected(task), abs=1e-12)
    assert run.callback_metrics.keys() == {"top1", "top2"}
    prompts = [template.replace("{}", name) for name in CLASSES for template in TEMPLATES]
    cut = sum(len(prompt) > CONTEXT for prompt in prompts)  # a token a letter
    assert task.sample_counts() == {"images": 8, "texts": len(prompts), "texts_cut": cut, "context_length": CONTEXT}
    assert 0 < cut < len(prompts)
    assert task.sample_scores()["top1"].clusters.tolist() == list(range(63, 71))


def test_logits_are_scaled_cosines(task, tmp_path):
    trainer(tmp_path).validate(task, datamodule=classification_data(), verbose=False)
    images = collate(classification_samples()[0])["images"]
    with torch.no_grad():
        rows = task.clip.encode_image(images).double()
        cosines = rows / rows.norm(dim=1, keepdim=True) @ classifier_by_loops(task.clip).T
        torch.testing.assert_close(task.logits(images).double(), torch.tensor(2.0).exp() * cosines, rtol=0, atol=1e-5)


def test_test_loop_gives_what_validate_gives(task, tmp_path):
    run = trainer(tmp_path)
    run.validate(task, datamodule=classification_data(), verbose=False)
    validated = task.results()
    run.test(task, datamodule=classification_data(), verbose=False)
    assert task.results() == validated


def test_identical_prompts_are_encoded_once(task):
    task.build_classifier(CLASSES)
    prompts = {template.replace("{}", name) for name in CLASSES for template in TEMPLATES}
    assert len(task.clip.texts_seen) == len(prompts) == 12


def test_prompts_are_encoded_from_short_to_long(task, monkeypatch):
    monkeypatch.setattr("lit_clipq.tasks.classification.text_lengths", lambda _, tokens: (tokens > 0).sum(1))
    sorted_first = task.build_classifier(CLASSES)
    lengths = [sum(token > 0 for token in tokens) for tokens in task.clip.texts_seen]
    assert lengths == sorted(lengths)
    torch.testing.assert_close(sorted_first.double(), classifier_by_loops(task.clip), rtol=0, atol=1e-6)


class ChangeTextTower(Callback):
    """Does what a quantizer does, when it does it."""

    def on_validation_start(self, trainer, pl_module):  # noqa: ARG002 Lightning's signature
        with torch.inference_mode(False), torch.no_grad():
            pl_module.clip.token.mul_(torch.linspace(-1, 1, 6))


def test_classifier_comes_from_the_text_tower_as_changed_by_callbacks(task, tmp_path):
    untouched = expected(task)
    trainer(tmp_path, callbacks=[ChangeTextTower()]).validate(task, datamodule=classification_data(), verbose=False)
    assert task.results() == pytest.approx(expected(task), abs=1e-12)
    assert task.results() != pytest.approx(untouched, abs=1e-12)


def test_constant_text_tower_scores_exactly_chance(task, tmp_path):
    with torch.no_grad():
        task.clip.token.zero_()
    trainer(tmp_path).validate(task, datamodule=classification_data(), verbose=False)
    assert task.results() == {"top1": 1 / 5, "top2": 2 / 5}


@pytest.mark.parametrize("names", [None, []])
def test_missing_class_names_are_refused(task, tmp_path, names):
    data = classification_data()
    data.class_names = names
    with pytest.raises(DataError, match="expected a datamodule with `class_names`"):
        trainer(tmp_path).validate(task, datamodule=data, verbose=False)


def test_label_without_a_class_is_refused(task, tmp_path):
    data = classification_data()
    data.class_names = CLASSES[:3]
    with pytest.raises(DataError, match="expected labels from 0 to 2"):
        trainer(tmp_path).validate(task, datamodule=data, verbose=False)


def test_presets():
    assert make_task(ZeroShotClassification, templates="simple").templates == ["a photo of a {}."]
    openai = make_task(ZeroShotClassification).templates
    assert len(set(openai)) == 80
    assert "a photo of the hard to see {}." in openai


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"templates": "imagenet"}, "expected templates 'openai', 'simple' or a list"),
        ({"templates": []}, "expected templates 'openai', 'simple' or a list"),
        ({"templates": ["a {}", "a photo"]}, "'a photo'; add it"),
        ({"ks": (0,)}, "of at least 1"),
        ({"text_batch_size": 0}, "of at least 1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make_task(ZeroShotClassification, **options)
