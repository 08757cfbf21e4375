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
    if plain:
        options |= {"alpha": 0.0, "beta": 0.0}
    try:
        model = timm.create_model(evolving, checkpoint_path=checkpoint, **options).eval()
    except Exception as error:  # timm, torch or the file may raise anything
        given = ", ".join(f"{key}={value}" for key, value in options.items()) or "none"
        raise ValueError(
            f"{name} cannot be created with options {given} and checkpoint {checkpoint or 'none'}; "
            f"options must be those of the training (--option num_classes=10): {error}"
        ) from error
    if not isinstance(model, (EvolvingVisionTransformer, EvolvingResNet)):
        raise ValueError(
            f"{name} must be a classifier, but its options make it a {type(model).__name__}"
        )
    if options.get("in_chans", 3) != 3:
        raise ValueError(f"in_chans must be 3, for colour images, got {options['in_chans']}")
    return model


def look(
    model: nn.Module, image: Image.Image, size: Union[int, Sequence[int], None] = None
) -> Look:
    """Runs the model on an image, to show the class token's attention or all patches' mean.

    Args:
        size: height and width to resize the image to; None means the model's own.
    """
    wanted = {} if size is None else {"input_size": (3, *to_2tuple(size))}
    config = resolve_data_config(wanted, model=model)
    transformed = create_transform(**config, is_training=False)(image.convert("RGB"))
    grids: Dict[str, Grid] = {}
    pixels = {n: m for n, m in model.named_modules() if isinstance(m, EvolvingAttention2d)}
    handles = [
        # The projection's input has been pooled.
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
    """A hook that records height and width of a module's input."""

    def hook(module: nn.Module, args: Tuple[Tensor, ...]) -> None:
        grids[name] = tuple(args[0].shape[-2:])

    return hook
