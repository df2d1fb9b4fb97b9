"""Convolutional networks for small images."""

from __future__ import annotations

from torch import Tensor, nn


def cnn(channels: int, size: int, classes: int, batch_norm: bool) -> nn.Module:
    """Two blocks of conv 3x3 (32), ReLU, max-pool 2, then conv 3x3 (64), ReLU and a linear layer.

    Args:
        channels, size: of the square images.
        classes: outputs.
        batch_norm: normalise after the first two convolutions, in front of the ReLU.
    """
    layers: list[nn.Module] = []
    width = channels
    for _ in range(2):
        layers.append(nn.Conv2d(width, 32, 3, padding=1))
        width = 32
        if batch_norm:
            layers.append(nn.BatchNorm2d(32))
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    side = size // 4
    layers += [nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * side * side, classes)]
    return nn.Sequential(*layers)


class _Residual(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        plain = stride == 1 and width_in == width
        self.shortcut: nn.Module = (
            nn.Identity()
            if plain
            else nn.Sequential(nn.Conv2d(width_in, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width))
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


# depth: (width of the first stage, residual blocks a stage)
RESNETS = {8: (16, (1, 1, 1)), 20: (16, (3, 3, 3)), 18: (64, (2, 2, 2, 2))}


def resnet(depth: int, channels: int, classes: int) -> nn.Module:
    """A residual network for images of 32 pixels (He et al. 2016, arXiv 1512.03385).

    Args:
        depth: 8 and 20 are their CIFAR networks, of three stages from 16 channels on; 18 the one of four stages from 64,
            with a first convolution of 3x3 and no first pooling, as is usual on CIFAR.
        channels: of the images.
        classes: outputs.

    Raises:
        KeyError: another depth.
    """
    width, blocks = RESNETS[depth]
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    before = width
    for stage, count in enumerate(blocks):
        now = width * 2**stage
        for block in range(count):
            layers.append(_Residual(before, now, stride=2 if stage and not block else 1))
            before = now
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))
