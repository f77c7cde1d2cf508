"""A ResNet of eight layers for 32x32 images, small enough for a CPU: 16 to 64 channels, stride 2 at once, group norm.

Not batch norm: ranks are computed one after the other on one model here, whose running statistics would be everyone's.
"""

from torch import Tensor, nn

CHANNELS, GROUPS = 16, 8


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, width, 3, stride, padding=1, bias=False),
            nn.GroupNorm(GROUPS, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.GroupNorm(GROUPS, width),
        )
        same = before == width and stride == 1
        self.around = nn.Identity() if same else nn.Conv2d(before, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return what comes after both ways, `(n, width, height / stride, width / stride)`."""
        added: Tensor = self.body(x) + self.around(x)
        return added.relu()


def resnet8(channels: int, classes: int) -> nn.Sequential:
    """Return the network for images of so many channels."""
    c = CHANNELS
    stem = (nn.Conv2d(channels, c, 3, stride=2, padding=1, bias=False), nn.GroupNorm(GROUPS, c), nn.ReLU())
    blocks = (Block(c, c, 1), Block(c, 2 * c, 2), Block(2 * c, 4 * c, 2))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * c, classes))
