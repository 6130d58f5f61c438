# SPDX-License-Identifier: MIT
"""The networks for images: torchvision's, and small ones for machines without a GPU."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """The residual block of He et al. (arXiv:1512.03385), with a projection where shapes differ."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.skip = nn.Sequential()
        if stride > 1 or channels_in != channels:
            self.skip.append(nn.Conv2d(channels_in, channels, 1, stride, bias=False))
            self.skip.append(nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, of half the size if it has stride 2."""
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)) + self.skip(x), inplace=True)


def small_resnet(classes: int, blocks: int, width: int, stem_stride: int) -> nn.Sequential:
    """He et al.'s ResNet for 32x32 images: three stages of `blocks` blocks, of `width` to
    4 `width` channels. torchvision has none of these widths."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 3, stem_stride, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    ]
    channels = width
    for stage, stride in enumerate((1, 2, 2)):
        for block in range(blocks):
            layers.append(Block(channels, width << stage, 1 if block else stride))
            channels = width << stage
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
    )


def torchvision_network(classes: int, name: str, for_small_images: bool) -> nn.Module:
    """A network of torchvision without its pretrained weights.

    For 32x32 images a ResNet's stem is one convolution of stride 1 and no pooling, and VGG's
    classifier one layer: there is but one pixel left, and 4096 hidden units would be most of the
    parameters.
    """
    from torchvision import models

    model: nn.Module = models.get_model(name, num_classes=classes)
    if for_small_images and name.startswith("vgg"):
        model.avgpool = nn.Identity()
        model.classifier = nn.Linear(512, classes)
    elif for_small_images:
        stem = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")  # as torchvision
        model.conv1, model.maxpool = stem, nn.Identity()
    return model


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "resnet8-fast": partial(small_resnet, blocks=1, width=16, stem_stride=2),
    "resnet8": partial(small_resnet, blocks=1, width=16, stem_stride=1),
    "resnet20": partial(small_resnet, blocks=3, width=16, stem_stride=1),
    "vgg11": partial(torchvision_network, name="vgg11", for_small_images=True),
    "vgg11_bn": partial(torchvision_network, name="vgg11_bn", for_small_images=True),
    "resnet18": partial(torchvision_network, name="resnet18", for_small_images=True),
    "resnet50": partial(torchvision_network, name="resnet50", for_small_images=True),
    "resnet50-imagenet": partial(torchvision_network, name="resnet50", for_small_images=False),
}


def crop(images: Tensor, boxes: Tensor, flip: Tensor, size: int) -> Tensor:
    """Cuts boxes out of images (n, c, h, w), resizes them to size x size and mirrors some.

    Boxes (n, 4) are centre x, centre y, width and height, in pixels; what lies outside of the image
    is 0. A box of the output's size whose edges lie between pixels is copied exactly, up to
    rounding.
    """
    height, width = images.shape[2:]
    x, y, w, h = boxes.T
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0] = w / width * torch.where(flip, -1.0, 1.0)
    theta[:, 1, 1] = h / height
    theta[:, 0, 2] = 2 * x / width - 1
    theta[:, 1, 2] = 2 * y / height - 1
    grid = F.affine_grid(theta, [len(images), images.shape[1], size, size], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def centre_boxes(count: int, image: Sequence[int], size: int) -> Tensor:
    """`count` boxes of size x size in the middle of images of this (h, w)."""
    height, width = image
    box = torch.tensor([width / 2, height / 2, size, size], dtype=torch.float32)
    return box.expand(count, 4)
