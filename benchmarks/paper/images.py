# SPDX-License-Identifier: MIT
"""Image classification: CIFAR-10, CIFAR-100, ImageNet, or any folder of images.

Every image is decoded once, into one tensor of bytes, and cut and mirrored as tensors.
"""

import hashlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.paper.networks import NETWORKS, centre_boxes, crop
from benchmarks.paper.records import write_whole
from benchmarks.paper.task import Batch, Generators, Source, Task, classify

HELD_OUT_BATCH = 1000
NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet": "ImageNet-1K"}
SUFFIXES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}


def decode(files: list[Path], size: int, target: Path) -> None:
    """Writes all images as one array (n, 3, size, size) of bytes, each cut to its middle square."""
    array = np.lib.format.open_memmap(
        target, mode="w+", dtype=np.uint8, shape=(len(files), 3, size, size)
    )

    def read(index: int) -> None:
        with Image.open(files[index]) as image:
            pixels = image.convert("RGB")
            if pixels.size != (size, size):
                pixels = ImageOps.fit(pixels, (size, size), Image.Resampling.BILINEAR)
            array[index] = np.asarray(pixels).transpose(2, 0, 1)

    with ThreadPoolExecutor() as pool:
        for _ in tqdm(pool.map(read, range(len(files))), "decoding", len(files), mininterval=1.0):
            pass
    array.flush()


def read_folder(root: Path, size: int, cache: Path) -> Batch:
    """Images (n, 3, size, size), as bytes, and labels of a directory with a folder per class.

    They are decoded into a file in `cache` when that isn't done yet; the tensor reads from there.
    """
    classes = sorted(folder for folder in root.iterdir() if folder.is_dir())
    files = [sorted(folder.iterdir()) for folder in classes]
    flat = [file for folder in files for file in folder]
    if not flat:
        raise FileNotFoundError(f"{root} has no folders of images, one for each class")
    labels = torch.repeat_interleave(torch.tensor([len(folder) for folder in files]))
    what = f"{root.resolve()} {size} {len(flat)} {max(file.stat().st_mtime_ns for file in flat)}"
    decoded = cache / f"{root.name}-{hashlib.sha256(what.encode()).hexdigest()[:16]}.npy"
    if not decoded.exists():
        cache.mkdir(parents=True, exist_ok=True)
        write_whole(decoded, lambda part: decode(flat, size, part))
    # Mapped copy-on-write: torch wants memory that could be written.
    return torch.from_numpy(np.load(decoded, mmap_mode="c")), labels


def read(data: str, train: bool, size: int, source: Source) -> Batch:
    """Images and labels: the user's directory if there is one, else torchvision's download."""
    if source.data is not None:
        held_out = "test" if (source.data / "test").is_dir() else "val"
        return read_folder(source.data / ("train" if train else held_out), size, source.cache)
    from torchvision import datasets

    downloads = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
    if data not in downloads:
        raise ValueError(f"{data} can't be downloaded: name its directory with --data")
    images = downloads[data](str(source.cache), train=train, download=True)
    return torch.from_numpy(images.data).permute(0, 3, 1, 2), torch.tensor(images.targets)


class Images(Task):
    """A data set and a network of `NETWORKS`.

    Args:
        final: whether the test data are held out; otherwise `validation` images of the training
            data are, and not trained on.
        source: where the data lie.
        data: "cifar10", "cifar100" or "imagenet".
        network: a name of `NETWORKS`.
        images: how many training images to use; all that there are if None.
        size: of the images that the network sees.
        stored: the size of the images in memory. If it is larger, training cuts out boxes of random
            size and shape (8 to 100 % of the area), otherwise boxes shifted by up to 4 pixels.
    """

    def __init__(
        self,
        final: bool,
        source: Source,
        data: str,
        network: str,
        images: int | None = None,
        size: int = 32,
        stored: int | None = None,
        validation: int = 5000,
    ) -> None:
        self.network, self.size, self.stored = network, size, stored or size
        self.name = NAMES[data]
        if source.data is not None:
            suffix = next(source.data.glob("train/*/*")).suffix
            self.name += f" ({SUFFIXES.get(suffix.lower(), suffix)})"
        self.x, self.y = read(data, True, self.stored, source)
        self.classes = int(self.y.max()) + 1
        pixels = self.x[:: max(1, len(self.x) // 10000)].float()
        self.mean = pixels.mean(dim=(0, 2, 3), keepdim=True)
        self.std = pixels.std(dim=(0, 2, 3), keepdim=True)
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(0))
        available = len(order) if final else len(order) - validation
        self.train = order[: min(images or available, available)]
        self.examples = len(self.train)
        if final:
            self.x_held_out, self.y_held_out = read(data, False, self.stored, source)
        else:
            chosen = order[-validation:].sort().values
            self.x_held_out, self.y_held_out = self.x[chosen], self.y[chosen]

    def describe(self) -> str:
        return f"{self.name}, {self.examples:,} images"

    def fingerprint(self) -> str:
        return hashlib.sha256(self.x_held_out.contiguous().numpy().data).hexdigest()[:16]

    def make_model(self, generators: Generators) -> nn.Module:
        return NETWORKS[self.network](self.classes)

    def prepare(self, images: Tensor, boxes: Tensor, flip: Tensor, device: torch.device) -> Tensor:
        """What the network sees of images (n, 3, h, w) of bytes. Beyond their edges lies the mean
        colour."""
        x = (images.to(device).float() - self.mean.to(device)) / self.std.to(device)
        return crop(x, boxes.to(device), flip.to(device), self.size)

    def random_boxes(self, count: int, generator: torch.Generator) -> Tensor:
        """Where to cut; see `stored`."""
        boxes = centre_boxes(count, self.x.shape[2:], self.size).clone()
        if self.stored == self.size:
            boxes[:, :2] += torch.randint(-4, 5, (count, 2), generator=generator)
            return boxes
        # torchvision's RandomResizedCrop, with sides clipped instead of drawn again.
        area, ratio, x, y = torch.rand(4, count, generator=generator)
        root = self.stored * (0.08 + 0.92 * area).sqrt()
        shape = torch.exp((ratio - 0.5) * math.log(4 / 3))
        w, h = (root * shape).clamp(max=self.stored), (root / shape).clamp(max=self.stored)
        return torch.stack([w / 2 + x * (self.stored - w), h / 2 + y * (self.stored - h), w, h], 1)

    def batch(
        self, indices: Tensor, generators: Generators, device: torch.device, share: slice
    ) -> Batch:
        count = indices.shape[1]
        boxes = self.random_boxes(count, generators[0])[share]
        flip = (torch.rand(count, generator=generators[0]) < 0.5)[share]
        chosen = self.train[indices[0, share]]
        return self.prepare(self.x[chosen], boxes, flip, device), self.y[chosen].to(device)

    def held_out(self, device: torch.device) -> Iterator[Batch]:
        for part in torch.split(torch.arange(len(self.y_held_out)), HELD_OUT_BATCH):
            x, y = self.x_held_out[part], self.y_held_out[part]
            boxes = centre_boxes(len(x), x.shape[2:], self.size)
            flip = torch.zeros(len(x), dtype=torch.bool)
            yield self.prepare(x, boxes, flip, device), y.to(device)

    def losses(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Batch:
        return classify(model(inputs), targets)
