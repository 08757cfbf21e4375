"""Maps of timm models, for an image."""

from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

import ea_timm  # noqa: F401 (registers the models)
from ea_timm.attention2d import EvolvingAttention2d
from ea_timm.vision_transformer import EvolvingVisionTransformer
from evolving_attention import AttentionMap, collect_maps

Grid = Tuple[int, int]


class Look(NamedTuple):
    """What a model sees of an image, and how.

    Attributes:
        image: what is left of it after resizing and cropping, (height, width, channels), 0 to 1.
        maps: of one forward pass.
        heat_of: the probabilities of one head of a map over the image, (rows, columns).
        whose: what these are, in words.
    """

    image: np.ndarray
    maps: List[AttentionMap]
    heat_of: Callable[[AttentionMap, int], Tensor]
    whose: str


def load(name: str, checkpoint: str = "", **options: Any) -> nn.Module:
    """timm's model of this name; a plain ViT or DeiT as ours with alpha = beta = 0.

    Raises:
        ValueError: no such model, or none with attention maps.
    """
    plain = not name.startswith("ea_")
    evolving = f"ea_{name}" if plain else name
    if not timm.is_model(evolving) or (plain and "resnet" in name):
        raise ValueError(
            f"the model must be one of {', '.join(timm.list_models('ea_*'))}, or a plain ViT or "
            f"DeiT of such a name without ea_, got {name}"
        )
    if plain:
        options |= {"alpha": 0.0, "beta": 0.0}
    return timm.create_model(evolving, checkpoint_path=checkpoint, **options).eval()


def look(model: nn.Module, image: Image.Image, size: Optional[int] = None) -> Look:
    """Runs the model on an image. The class token's row is shown, or the mean of all patches'.

    Args:
        size: height and width that the image is brought to; None is the model's own.
    """
    config = resolve_data_config({"img_size": size}, model=model)
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
    if isinstance(model, EvolvingVisionTransformer):
        prefix, whose = model.num_prefix_tokens, "mean attention of all patches"
        if model.global_pool == "token":
            row, whose = 0, "attention of the class token"
        grid = model.patch_embed.dynamic_feat_size(transformed.shape[-2:])
        grids = {attention.name: grid for attention in maps}

    def heat_of(attention: AttentionMap, head: int) -> Tensor:
        probs = attention.attn_probs[0, head]
        probs = probs[prefix:].mean(dim=0) if row is None else probs[row]
        return probs[prefix:].unflatten(0, grids[attention.name])

    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    seen = (transformed * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    return Look(seen, maps, heat_of, whose)


def grid_keeper(grids: Dict[str, Grid], name: str) -> Callable:
    """A hook that keeps height and width of a module's input."""

    def hook(module: nn.Module, args: Tuple[Tensor, ...]) -> None:
        grids[name] = tuple(args[0].shape[-2:])

    return hook
