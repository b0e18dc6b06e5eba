import pytest
import timm
import torch
from torch import nn

from lit_clipq.errors import ModelError
from lit_clipq.models import fold_batchnorm, make_explicit
from tests.models.conftest import CONFIGS, build, randomize


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@torch.no_grad()
def test_modified_resnet_is_folded_completely():
    model = build(CONFIGS["resnet"])
    count = len(norms(model))
    assert count == 3 + 5 * 3 + 4
    images = torch.randn(2, 3, 64, 64)
    expected = model.encode_image(images)
    make_explicit(model)
    assert fold_batchnorm(model) == count
    assert not norms(model)
    assert (model.encode_image(images) - expected).abs().max() <= 1e-5
    assert fold_batchnorm(model) == 0


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"stem_type": "deep", "stem_width": 8, "avg_down": True}])
@pytest.mark.parametrize("block", [timm.models.resnet.BasicBlock, timm.models.resnet.Bottleneck])
def test_timm_resnet_is_folded_completely(block, options):
    model = randomize(timm.models.resnet.ResNet(block, (1, 1, 1, 1), num_classes=5, **options))
    count = len(norms(model))
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    assert fold_batchnorm(model) == count > 0
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_convolution_with_bias_and_norm_without_affine_in_a_sequential():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU()).eval()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    assert fold_batchnorm(model) == 1
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_norm_before_its_convolution_and_one_of_an_unknown_module_stay():
    class Unknown(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn1, self.conv1 = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv1(self.bn1(x))

    model = randomize(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), Unknown()))
    x = torch.randn(2, 3, 4, 4)
    expected = model(x)
    assert fold_batchnorm(model) == 0
    assert len(norms(model)) == 2
    assert torch.equal(model(x), expected)


def test_train_mode_is_refused_by_name():
    model = build(CONFIGS["resnet"]).train()
    with pytest.raises(ModelError, match=r"visual\.bn1"):
        fold_batchnorm(model)


def test_non_finite_statistics_are_named():
    model = build(CONFIGS["resnet"])
    model.visual.layer1[0].bn2.running_var[0] = float("nan")
    with pytest.raises(ModelError, match=r"visual\.layer1\.0\.bn2"):
        fold_batchnorm(model)
