"""Networks fit the images they are given."""

import pytest
import torch

from launch.models import MODELS, build_model


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_takes_every_small_image(name: str, shape: tuple[int, int, int]) -> None:
    with torch.device("meta"):  # shapes without the arithmetic
        assert build_model(name, shape, classes=7)(torch.zeros(2, *shape)).shape == (2, 7)


def test_a_resnet_takes_large_images_of_any_depth() -> None:
    with torch.device("meta"):
        assert build_model("resnet18", (1, 96, 96), classes=7)(torch.zeros(2, 1, 96, 96)).shape == (2, 7)


def test_the_demonstration_has_the_network_of_its_numbers() -> None:
    with torch.device("meta"):
        mlp, resnet = build_model("mlp", (1, 8, 8), 10), build_model("resnet18", (3, 32, 32), 10)
    assert sum(p.numel() for p in mlp.parameters()) == 64 * 256 + 256 + 256 * 10 + 10
    assert sum(p.numel() for p in resnet.parameters()) == 11_173_962  # the usual one for CIFAR-10
