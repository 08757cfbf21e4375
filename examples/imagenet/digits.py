"""Trains a model on real images without a download, in minutes on a CPU.

    python examples/imagenet/digits.py --model ea_vit_tiny

Writes scikit-learn's 1,797 handwritten digits as an ImageFolder, (--folder)/train and
(--folder)/validation with a folder for each class, which is what timm's train.py and validate.py
read as well; then trains the model on it, with timm's own loader, optimizer and schedule, and
saves it as (--folder)/MODEL.pth. (Not the ImageNet recipes: these are in the README.)
"""

import argparse
import zlib
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_dataset, create_loader, get_img_extensions
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy
from torch.nn import functional as F

import ea_timm  # noqa: F401 (registers the models)
from evolving_attention.commands import (
    DataError,
    add_overwrite,
    check_output,
    positive,
    whole_or_not_at_all,
)

SIZE = 32
STATISTICS = {"mean": (0.3, 0.3, 0.3), "std": (0.35, 0.35, 0.35)}


def images() -> dict[Path, Image.Image]:
    """The digits, 32 x 32, by file name; the same ones are always for validation."""
    digits = load_digits()
    found = {}
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "validation" if zlib.crc32(str(index).encode()) % 5 == 0 else "train"
        image = Image.fromarray((pixels * (255 / 16)).astype(np.uint8))
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB")
        found[Path(split) / str(label) / f"{index:04d}.png"] = image
    return found


def write_images(folder: Path) -> None:
    """The digits as PNG files, unless they are there already.

    Raises:
        DataError: train/ or validation/ holds other images, which the model would be trained on.
    """
    wanted = images()
    there = [folder / split for split in ("train", "validation") if (folder / split).exists()]
    found = [path for root in there for path in root.rglob("*") if is_image(path)]
    for path in found:
        image = wanted.pop(path.relative_to(folder), None)
        with Image.open(path) as known:
            if image is None or known.convert("RGB").tobytes() != image.tobytes():
                raise DataError(f"{path} is none of the digits; give another --folder")
    for name, image in wanted.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_or_not_at_all(path) as part:
            image.save(part)


def is_image(path: Path) -> bool:
    return path.suffix.lower() in get_img_extensions()


def loader(folder: Path, split: str, batch_size: int) -> torch.utils.data.DataLoader:
    """timm's loader of one split, without augmentation."""
    return create_loader(
        create_dataset("", root=folder, split=split),
        input_size=(3, SIZE, SIZE),
        batch_size=batch_size,
        is_training=split == "train",
        use_prefetcher=False,
        no_aug=True,
        crop_pct=1.0,
        num_workers=0,
        device=torch.device("cpu"),
        **STATISTICS,
    )


@torch.no_grad()
def validate(model: torch.nn.Module, batches: torch.utils.data.DataLoader) -> float:
    """Top-1 accuracy in per cent."""
    model.eval()
    top1 = AverageMeter()
    for images, labels in batches:
        top1.update(accuracy(model(images), labels)[0].item(), len(labels))
    return top1.avg


def main() -> None:
    """Writes the images, trains, validates after every epoch, saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ea_vit_tiny", help="any of timm's or ea_timm's")
    parser.add_argument("--epochs", type=positive, default=10)
    parser.add_argument("--batch-size", type=positive, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("digits"))
    add_overwrite(parser)
    parser.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        action=timm.utils.ParseKwargs,
        metavar="NAME=VALUE",
        help="alpha=0.3 beta=0.3 ..., as in timm's train.py",
    )
    try:
        args = parser.parse_args()
    except ValueError:  # of timm's own action
        parser.error("--model-kwargs must be NAME=VALUE ...")
    if not args.lr > 0:
        parser.error(f"--lr must be more than 0, got {args.lr}")
    if not timm.is_model(args.model):
        parser.error(f"--model {args.model} is unknown; see timm.list_models('ea_*')")

    torch.manual_seed(args.seed)
    path = args.folder / f"{args.model}.pth"
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
        check_output(path, args.overwrite)
        write_images(args.folder)
    except (DataError, OSError) as error:
        parser.error(f"--folder: {error}")
    # Half of ViT-Tiny's depth is enough for digits, and sixteen patches.
    is_vit = args.model.removeprefix("ea_").startswith(("vit_", "deit_", "deit3_"))
    sizes = {"img_size": SIZE, "patch_size": 8, "depth": 6} if is_vit else {}
    try:
        model = timm.create_model(args.model, num_classes=10, **{**sizes, **args.model_kwargs})
        model.eval()(torch.zeros(1, 3, SIZE, SIZE))
    except (TypeError, ValueError, RuntimeError, AssertionError, ArithmeticError) as error:
        parser.error(f"--model-kwargs: {error}")
    train, validation = (
        loader(args.folder, split, args.batch_size) for split in ("train", "validation")
    )
    if not len(train):
        parser.error(
            f"--batch-size must be {len(train.dataset)} or less, the images there are to train "
            f"with, got {args.batch_size}"
        )
    print(
        f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters; "
        f"{len(train.dataset)} images to train with, {len(validation.dataset)} to validate with"
    )
    optimizer = create_optimizer_v2(model, "adamw", lr=args.lr, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(
        optimizer, num_epochs=args.epochs, warmup_epochs=1, warmup_lr=args.lr / 10
    )
    for epoch in range(args.epochs):
        scheduler.step(epoch)
        model.train()
        losses = AverageMeter()
        for images, labels in train:
            loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.update(loss.item(), len(labels))
        top1 = validate(model, validation)
        print(
            f"epoch {epoch + 1}: training loss {losses.avg:.3f}, accuracy {top1:.1f} %", flush=True
        )
    with whole_or_not_at_all(path, args.overwrite) as part:
        torch.save({"arch": args.model, "state_dict": model.state_dict()}, part)
    print(f"saved as {path}")


if __name__ == "__main__":
    main()
