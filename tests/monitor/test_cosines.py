"""The picture of the cosines in TensorBoard: its colours, its labels, and what it is without matplotlib."""

import sys

import pytest
import torch

from gaf_ddp.monitor.cosines import labelled, picture, plain


def test_picture_is_blue_where_ranks_agree_and_orange_where_they_are_opposed() -> None:
    image = plain([[1.0, -1.0], [None, 0.5]])
    assert image.shape[0] == 3
    assert image.min() >= 0
    assert image.max() <= 1
    height, width = (size // 2 for size in image.shape[1:])
    agree, opposed, unknown, half = (image[:, row * height, column * width] for row in range(2) for column in range(2))
    assert agree[2] > agree[0]
    assert opposed[0] > opposed[2]
    assert unknown.tolist() == [1, 1, 1]
    torch.testing.assert_close(half, (agree + 1) / 2)


@pytest.mark.parametrize("world", [2, 3, 8, 16, 64])
def test_with_labels_of_any_number_of_ranks(world: int) -> None:
    pytest.importorskip("matplotlib")
    cosine = torch.eye(world).mul(2).sub(1).tolist()
    image = labelled(cosine)
    channels, height, width = image.shape
    assert channels == 3
    assert 400 <= height <= width <= 900
    assert image.dtype == torch.float32
    assert (image.min().item(), image.max().item()) == (0, 1)
    colours = image.flatten(1).T
    for colour in ([213, 94, 0], [0, 114, 178]):
        found = (colours - torch.tensor(colour) / 255).abs().amax(1) < 0.01
        assert found.sum() > 0.4 * height * width / max(world, 4) / 4


def test_unknown_is_grey_and_not_white() -> None:
    pytest.importorskip("matplotlib")
    grey = torch.tensor([187.0] * 3) / 255
    image = labelled([[1.0, None], [None, 1.0]]).flatten(1).T
    assert ((image - grey).abs().amax(1) < 0.01).sum() > 10_000


def test_without_matplotlib_it_has_no_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    cosine: list[list[float | None]] = [[1.0, -1.0], [None, 0.5]]
    assert torch.equal(picture(cosine), plain(cosine))
