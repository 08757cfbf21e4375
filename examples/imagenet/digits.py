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
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy
from torch.nn import functional as F

import ea_timm  # noqa: F401 (registers the models)

SIZE = 32
STATISTICS = {"mean": (0.3, 0.3, 0.3), "std": (0.35, 0.35, 0.35)}


def write_images(folder: Path) -> None:
    """The digits as 32 x 32 PNG files; every fifth is for validation, whoever runs this."""
    digits = load_digits()
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "validation" if zlib.crc32(str(index).encode()) % 5 == 0 else "train"
        path = folder / split / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * (255 / 16)).astype(np.uint8))
        image.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB").save(path)


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
    """Top-1 accuracy in percent."""
    model.eval()
    top1 = AverageMeter()
    for images, labels in batches:
        top1.update(accuracy(model(images), labels)[0].item(), len(labels))
    return top1.avg


def positive(text: str) -> int:
    """The type of an option that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return int(text)


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
    try:
        write_images(args.folder)
    except OSError as error:
        parser.error(f"--folder: {error}")
    # Half of ViT-Tiny's depth is enough for digits, and sixteen patches.
    is_vit = args.model.removeprefix("ea_").startswith(("vit_", "deit_"))
    sizes = {"img_size": SIZE, "patch_size": 8, "depth": 6} if is_vit else {}
    try:
        model = timm.create_model(args.model, num_classes=10, **{**sizes, **args.model_kwargs})
    except (TypeError, ValueError) as error:
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
    path = args.folder / f"{args.model}.pth"
    torch.save({"arch": args.model, "state_dict": model.state_dict()}, path)
    print(f"saved as {path}")


if __name__ == "__main__":
    main()
