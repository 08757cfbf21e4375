"""Maps of timm models, for an image."""

from pathlib import Path
from typing import Any, Callable, Dict, Sequence, Tuple, Union

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.layers import to_2tuple
from torch import Tensor, nn

import ea_timm  # noqa: F401 (registers the models)
from ea_maps.draw import Look
from ea_timm.attention2d import EvolvingAttention2d
from ea_timm.resnet import EvolvingResNet
from ea_timm.vision_transformer import EvolvingVisionTransformer
from evolving_attention import AttentionMap, collect_maps

Grid = Tuple[int, int]


def load(name: str, checkpoint: str = "", **options: Any) -> nn.Module:
    """timm's model of this name; a plain ViT or DeiT as ours with alpha = beta = 0.

    Raises:
        ValueError: no such model, or none with attention maps over an image, or options or a
            checkpoint that do not fit it.
        FileNotFoundError: no such checkpoint.
    """
    plain = not name.startswith("ea_")
    evolving = f"ea_{name}" if plain else name
    if not timm.is_model(evolving) or (plain and "resnet" in name):
        raise ValueError(
            f"the model must be one of {', '.join(timm.list_models('ea_*'))}, or a plain ViT or "
            f"DeiT of such a name without ea_, got {name}"
        )
    if checkpoint and not Path(checkpoint).is_file():
        raise FileNotFoundError(f"there is no checkpoint {checkpoint}")
    if plain:
        options |= {"alpha": 0.0, "beta": 0.0}
    try:
        model = timm.create_model(evolving, checkpoint_path=checkpoint, **options).eval()
    except Exception as error:  # whatever timm, torch or the file have against it
        given = ", ".join(f"{key}={value}" for key, value in options.items()) or "none"
        raise ValueError(
            f"{name} with options {given} and checkpoint {checkpoint or 'none'} cannot be made; "
            f"options must be those of the training (--option num_classes=10): {error}"
        ) from error
    if not isinstance(model, (EvolvingVisionTransformer, EvolvingResNet)):
        raise ValueError(
            f"{name} must be a classifier, options make a {type(model).__name__} of it"
        )
    if options.get("in_chans", 3) != 3:
        raise ValueError(f"in_chans must be 3, for images in colour, got {options['in_chans']}")
    return model


def look(
    model: nn.Module, image: Image.Image, size: Union[int, Sequence[int], None] = None
) -> Look:
    """Runs the model on an image. The class token's row is shown, or the mean of all patches'.

    Args:
        size: height and width that the image is brought to; None is the model's own.
    """
    wanted = {} if size is None else {"input_size": (3, *to_2tuple(size))}
    config = resolve_data_config(wanted, model=model)
    transformed = create_transform(**config, is_training=False)(image.convert("RGB"))
    grids: Dict[str, Grid] = {}
    pixels = {n: m for n, m in model.named_modules() if isinstance(m, EvolvingAttention2d)}
    handles = [
        # What the projection gets is pooled already.
        module.kqv.register_forward_pre_hook(grid_keeper(grids, name))
        for name, module in pixels.items()
    ]
    with torch.no_grad(), collect_maps(model) as maps:
        model(transformed.unsqueeze(0))
    for handle in handles:
        handle.remove()
    prefix, row, whose = 0, None, "mean attention of all pixels"
    covers = tuple(transformed.shape[-2:])
    if isinstance(model, EvolvingVisionTransformer):
        prefix, whose = model.num_prefix_tokens, "mean attention of all patches"
        if model.global_pool == "token":
            row, whose = 0, "attention of the class token"
        grid = model.patch_embed.dynamic_feat_size(transformed.shape[-2:])
        grids = {attention.name: grid for attention in maps}
        covers = tuple(n * size for n, size in zip(grid, model.patch_embed.patch_size, strict=True))

    def heat_of(attention: AttentionMap, head: int) -> Tensor:
        probs = attention.attn_probs[0, head]
        probs = probs[prefix:].mean(dim=0) if row is None else probs[row]
        return probs[prefix:].unflatten(0, grids[attention.name])

    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    seen = (transformed * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    return Look(seen, maps, heat_of, covers, whose)


def grid_keeper(grids: Dict[str, Grid], name: str) -> Callable:
    """A hook that keeps height and width of a module's input."""

    def hook(module: nn.Module, args: Tuple[Tensor, ...]) -> None:
        grids[name] = tuple(args[0].shape[-2:])

    return hook
