"""Networks to train: small ones for the CPU, torchvision's ResNets with a stem that suits small images."""

from collections.abc import Callable

from torch import nn

SMALL_IMAGE = 64  # up to this side a ResNet starts with a 3x3 convolution and no pooling, as is usual for CIFAR


def build_model(name: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Return a freshly initialised network for images of `shape` (channels, height, width)."""
    return MODELS[name](shape, classes)


def _mlp(shape: tuple[int, int, int], classes: int) -> nn.Module:
    channels, height, width = shape
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, 256), nn.ReLU(), nn.Linear(256, classes))


def _conv(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Return three 3x3 convolutions, 32 to 128 channels wide, then the mean over the image."""
    layers: list[nn.Module] = []
    before = shape[0]
    for width in (32, 64, 128):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def _resnet(depth: int) -> Callable[[tuple[int, int, int], int], nn.Module]:
    def build(shape: tuple[int, int, int], classes: int) -> nn.Module:
        # Here, as it takes a second to import and the demonstration has no use for it.
        from torchvision import models

        network: nn.Module = getattr(models, f"resnet{depth}")(num_classes=classes)
        channels, height, _ = shape
        if height <= SMALL_IMAGE:
            network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
            network.maxpool = nn.Identity()
        elif channels != 3:
            network.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        return network

    return build


MODELS: dict[str, Callable[[tuple[int, int, int], int], nn.Module]] = {
    "mlp": _mlp,
    "conv": _conv,
    "resnet18": _resnet(18),
    "resnet34": _resnet(34),
    "resnet50": _resnet(50),
}
