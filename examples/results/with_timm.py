"""Experiments with timm: classification of CIFAR-10's small images."""

import dataclasses
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Dict, Iterator, Tuple

import numpy as np
import timm
import torch
from experiment import (
    PLAIN,
    WEIGHTS,
    Experiment,
    ExperimentError,
    Options,
    Result,
    set_start,
    sets_start,
)
from PIL import Image
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn import functional as F

import ea_timm  # noqa: F401 (registers the models)
from evolving_attention.commands import whole_or_not_at_all

CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


@dataclass
class Images(Experiment):
    """A model of ea_timm on an ImageFolder of CIFAR-10, with random crops and flips.

    Attributes:
        model: timm's name of it.
        model_options: for `timm.create_model`.
        epochs, batch_size, lr: of the training by AdamW, with a cosine schedule.
        size: pixels of a side, to which images are enlarged.
        mixes: train as DeiT does, with mixup and CutMix.
        precision: of matrix products, as for `torch.set_float32_matmul_precision`.
        memory_format: of images and model; convolutions are faster with the channels last.
        stride: trains with each `stride`-th image only.
    """

    model: str
    model_options: Dict[str, Any]
    epochs: int
    batch_size: int
    lr: float
    size: int = 32
    mixes: bool = False
    precision: str = "highest"
    memory_format: torch.memory_format = torch.contiguous_format
    stride: int = 1

    def prepare(self, data: Path, work: Path) -> None:
        target = work / "cifar10.pt"
        if not target.exists():
            images = read_images(data / "cifar10")
            with whole_or_not_at_all(target) as part:
                torch.save(images, part)

    def shortened(self) -> Experiment:
        return dataclasses.replace(self, epochs=1, stride=3)

    def train(self, options: Options, seed: int, work: Path, run: Path) -> Result:
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision(self.precision)
        images, labels, test_images, test_labels = torch.load(work / "cifar10.pt")
        images, labels = images[:: self.stride], labels[:: self.stride]
        model = self.build(options, seed).to(memory_format=self.memory_format)
        mix = None
        if self.mixes:
            np.random.seed(seed)  # timm's Mixup draws from it
            mix = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=0.05)
        steps = len(labels) // self.batch_size
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=steps)
        falling = steps * max(1, self.epochs - 1)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, falling)
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [steps])
        order = torch.Generator().manual_seed(seed)
        curve = []
        start = time.perf_counter()
        testing = 0.0
        for epoch in range(1, self.epochs + 1):
            model.train()
            batches = torch.randperm(len(labels), generator=order).split(self.batch_size)
            for batch in batches[:steps]:
                x, target = augment(images[batch], order), labels[batch]
                if mix is not None:
                    x, target = mix(x, target)
                loss = F.cross_entropy(
                    model(self.enlarge(x)), target, label_smoothing=0.0 if self.mixes else 0.1
                )
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
            before = time.perf_counter()
            loss, accuracy = self.evaluate(model, test_images, test_labels)
            testing += time.perf_counter() - before
            curve.append((epoch * steps, accuracy))
            with (run / "train.log").open("a") as log:
                log.write(f"epoch {epoch}: test loss {loss:.4f}, accuracy {accuracy:.2f}\n")
        seconds = time.perf_counter() - start - testing
        torch.save(model.state_dict(), run / WEIGHTS)
        return Result(dict(zip(self.scores, (accuracy, -loss), strict=True)), curve, seconds)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tuple[float, float]:
        """Cross-entropy, and accuracy in per cent."""
        model.eval()
        logits = torch.cat([model(self.enlarge(normalise(x))) for x in images.split(250)])
        loss = F.cross_entropy(logits, labels).item()
        right = (logits.argmax(dim=1) == labels).sum().item()
        return loss, 100 * right / len(labels)

    def enlarge(self, images: Tensor) -> Tensor:
        """(B, 3, 32, 32) -> (B, 3, size, size), in the model's memory format."""
        images = images.contiguous(memory_format=self.memory_format)
        if self.size == images.size(-1):
            return images
        return F.interpolate(images, self.size, mode="bilinear")

    def build(self, options: Options, seed: int) -> nn.Module:
        """The model in this setting, whose other weights are those of the plain model."""
        plain, model = (self.create(setting, seed) for setting in (PLAIN, options))
        weights = {k: v for k, v in plain.state_dict().items() if ".evolution." not in k}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected and all(".evolution." in name for name in missing)
        if sets_start(options):
            set_start(model, options)
        return model

    def create(self, options: Options, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        options = {name: value for name, value in options.items() if name != "start"}
        return timm.create_model(self.model, num_classes=10, **self.model_options, **options)


def files_in(folder: Path) -> Iterator[Tuple[str, IO[bytes]]]:
    """The images of a folder with train/ and val/, or of an archive of it: their paths, open."""
    archive = folder / "cifar10_15000.tar.gz"
    if archive.is_file():
        with tarfile.open(archive) as tar:  # in its own order: going back is slow when compressed
            for member in tar:
                if member.isfile():
                    yield member.name, tar.extractfile(member)
    elif (folder / "train").is_dir() and (folder / "val").is_dir():
        for split in ("train", "val"):
            for path in (folder / split).glob("*/*"):
                with path.open("rb") as file:
                    yield path.as_posix(), file
    else:
        raise ExperimentError(f"--data: there is no {archive}, and no train and val in {folder}")


def read_images(folder: Path) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (N, 3, 32, 32) and labels (N,), then those of the test, as bytes."""
    pictures: Dict[str, Tensor] = {}
    for path, file in files_in(folder):
        with Image.open(file) as image:
            if image.size != (32, 32):
                raise ExperimentError(f"--data: {path} must have 32 x 32 pixels, got {image.size}")
            content = bytearray(image.convert("RGB").tobytes())
        pixels = torch.frombuffer(content, dtype=torch.uint8)
        pictures[path] = pixels.view(32, 32, 3).permute(2, 0, 1)
    found: Dict[str, Tuple[list, list]] = {"train": ([], []), "val": ([], [])}
    for path, pixels in sorted(pictures.items()):
        *_, split, name, _ = path.split("/")
        if name not in CLASSES:
            raise ExperimentError(f"--data: {path} must be in a folder of {', '.join(CLASSES)}")
        images, labels = found[split]
        images.append(pixels)
        labels.append(CLASSES.index(name))
    (images, labels), (test_images, test_labels) = found.values()
    return (
        torch.stack(images),
        torch.tensor(labels),
        torch.stack(test_images),
        torch.tensor(test_labels),
    )


def normalise(images: Tensor) -> Tensor:
    """Bytes -> numbers around 0."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    return (images / 255 - mean) / std


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops after padding by 4 pixels, and random flips, of (B, 3, 32, 32)."""
    padded = F.pad(normalise(images), (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, len(images)), generator=generator)
    pixels = torch.arange(32)
    columns = torch.where(
        torch.rand(len(images), 1, generator=generator) < 0.5, pixels, pixels.flip(0)
    )
    rows = (top[:, None] + pixels)[:, :, None]  # (B, 32, 1)
    columns = (left[:, None] + columns)[:, None, :]  # (B, 1, 32)
    batch = torch.arange(len(images))[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows, columns].permute(0, 3, 1, 2)
