"""Maps of timm models, for an image."""

import sys
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Sequence, Tuple, Union

import numpy as np
import timm
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import create_transform, resolve_data_config
from timm.layers import to_2tuple
from torch import Tensor, nn

import ea_timm  # noqa: F401 (registers the models)
from ea_maps.draw import Look
from ea_timm.attention2d import EvolvingAttention2d
from ea_timm.resnet import EvolvingResNet
from ea_timm.vision_transformer import EvolvingVisionTransformer
from evolving_attention import collect_maps

Grid = Tuple[int, int]
CLASSIFIERS = (EvolvingVisionTransformer, EvolvingResNet)
BITS = (8, 10, 12, 14, 16, 24)  # of the numbers in an image
LARGE, DRAFT = 50_000_000, 2048  # pixels of an image to be read smaller, and the least side then


def load(name: str, checkpoint: str = "", **options: Any) -> nn.Module:
    """Creates a model of timm; a plain ViT or DeiT becomes ours with alpha = beta = 0.

    Raises:
        ValueError: there is no such model, or it has no attention maps over an image, or the
            options or the checkpoint do not fit it.
        FileNotFoundError: there is no such checkpoint.
    """
    plain = not name.startswith("ea_")
    evolving = f"ea_{name}" if plain else name
    if not timm.is_model(evolving) or (plain and "resnet" in name):
        raise ValueError(
            f"the model must be one of {', '.join(timm.list_models('ea_*'))}, or the plain ViT or "
            f"DeiT of such a name without ea_, got {name}"
        )
    if checkpoint and not Path(checkpoint).is_file():
        raise FileNotFoundError(f"there is no checkpoint {checkpoint}")
    if options.get("in_chans", 3) != 3:
        raise ValueError(f"in_chans must be 3, for colour images, got {options['in_chans']}")
    if plain:
        options |= {"alpha": 0.0, "beta": 0.0, "learnable": False}
    try:
        model = timm.create_model(evolving, checkpoint_path=checkpoint, **options).eval()
    except Exception as error:  # timm, torch or the file may raise anything
        given = ", ".join(f"{key}={value}" for key, value in options.items()) or "none"
        raise ValueError(
            f"{name} cannot be created with options {given} and checkpoint {checkpoint or 'none'}; "
            f"options must be those of the training (--option num_classes=10): {error}"
        ) from error
    if not isinstance(model, CLASSIFIERS):
        raise ValueError(
            f"{name} must be a classifier, but with its options it is of class "
            f"{type(model).__name__}"
        )
    return model


def read(path: Path) -> Image.Image:
    """Reads an image as 8-bit RGB, as a viewer would show it.

    Of an animation, it is the first frame, and a very large image becomes smaller.

    Raises:
        ValueError: the file is no image, or is damaged or too large for the memory.
        OSError: there is no such file, or it cannot be opened.
    """
    with warnings.catch_warnings(), unlimited():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(path) as image:
                large = image.width * image.height > LARGE
                if large:
                    image.draft("RGB", (DRAFT, DRAFT))  # JPEG can be read at a smaller size
                if getattr(image, "n_frames", 1) > 1:
                    frames = f"{image.n_frames} frames; the first is shown"
                    print(f"ea_maps: {path} has {frames}", file=sys.stderr)
                ImageOps.exif_transpose(image, in_place=True)
                factor = max(1, min(image.size) // DRAFT)
                if large and image.mode in ("L", "RGB", "RGBA"):
                    return as_rgb(image.reduce(factor))
                return as_rgb(image)
        except UnidentifiedImageError:
            raise ValueError(f"{path} is not an image") from None
        except MemoryError:
            raise ValueError(f"{path} is too large for the memory; make it smaller") from None
        except (OSError, SyntaxError, EOFError) as error:  # Pillow's for broken files
            if getattr(error, "errno", None) is not None:
                raise  # the system's: there is no such file, or it is a folder, ...
            raise ValueError(f"{path} is damaged: {error}") from None


@contextmanager
def unlimited() -> Iterator[None]:
    """Lets Pillow read images of any size, since the user has named this one."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def as_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB, on white where it is transparent.

    Pillow itself would clip more than 8 bits to white, and show what transparency hides. Whole
    numbers are scaled by the smallest usual bit depth that holds them all; fractions are taken to
    lie in [0, 1] if they do, and otherwise to span from black to white.

    Raises:
        ValueError: there are fractions that are not finite.
    """
    if not image.mode.startswith(("I", "F")):
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")
    numbers = np.asarray(image).astype(np.float64)
    low, high = numbers.min(), numbers.max()
    if not np.isfinite([low, high]).all():
        raise ValueError("the image must hold finite numbers, but holds NaN or infinity")
    if image.mode.startswith("I"):
        low = min(low, 0)
        high = next((2**bits - 1 for bits in BITS if high < 2**bits), high)
    elif low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    grey = 255 * (numbers - low) / max(high - low, 1e-30)
    return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")


def size_of(model: Union[EvolvingVisionTransformer, EvolvingResNet]) -> Tuple[int, int]:
    """Height and width of the images that a model of :func:`load` was made for."""
    if isinstance(model, EvolvingVisionTransformer):
        return to_2tuple(model.patch_embed.img_size)
    return model.img_size


def look(
    model: nn.Module, image: Image.Image, size: Union[int, Sequence[int], None] = None
) -> Look:
    """Runs the model on an image, to show the class token's attention or all patches' mean.

    Args:
        size: height and width to resize the image to; None means the model's own.

    Raises:
        ValueError: the model is not one of ea_timm, or is in training mode, in which a pass would
            change it, or the image is not one of PIL.
    """
    if not isinstance(model, CLASSIFIERS):
        raise ValueError(
            f"model must be a classifier of ea_timm, got {type(model).__name__}; "
            "ea_maps.image.load makes one of a plain ViT or DeiT"
        )
    if model.training:
        raise ValueError("model must be in evaluation mode: call model.eval() first")
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"image must be a PIL image, got {type(image).__name__}; ea_maps.image.read reads a "
            "file, and PIL.Image.fromarray takes an array (height, width, 3) of bytes"
        )
    size = size_of(model) if size is None else to_2tuple(size)
    config = resolve_data_config({"input_size": (3, *size)}, model=model)
    transformed = create_transform(**config, is_training=False)(as_rgb(image))
    grids: Dict[str, Grid] = {}
    pixels = {n: m for n, m in model.named_modules() if isinstance(m, EvolvingAttention2d)}
    with ExitStack() as hooks, torch.no_grad(), collect_maps(model) as maps:
        for name, module in pixels.items():  # the projection's input has been pooled
            hooks.enter_context(module.kqv.register_forward_pre_hook(grid_keeper(grids, name)))
        first = next(model.parameters())
        model(transformed.unsqueeze(0).to(first.device, first.dtype))
    prefix, row = 0, None
    covers = tuple(transformed.shape[-2:])
    if isinstance(model, EvolvingVisionTransformer):
        prefix, row = model.num_prefix_tokens, 0 if model.global_pool == "token" else None
        grid = model.patch_embed.dynamic_feat_size(transformed.shape[-2:])
        grids = {attention.name: grid for attention in maps}
        covers = tuple(n * size for n, size in zip(grid, model.patch_embed.patch_size, strict=True))
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    seen = (transformed * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    return Look(seen, maps, grids, prefix, row, covers)


def grid_keeper(grids: Dict[str, Grid], name: str) -> Callable:
    """A hook that records height and width of a module's input."""

    def hook(module: nn.Module, args: Tuple[Tensor, ...]) -> None:
        grids[name] = tuple(args[0].shape[-2:])

    return hook
