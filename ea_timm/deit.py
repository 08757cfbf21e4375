"""DeiT with evolving attention: ``ea_deit_*``, including distilled models."""

from functools import partial
from typing import Any, Dict

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import checkpoint_filter_fn

from ea_timm.builder import entrypoint
from ea_timm.vision_transformer import BASE, SMALL, TINY, EvolvingVisionTransformer, cfg


class EvolvingVisionTransformerDistilled(EvolvingVisionTransformer, VisionTransformerDistilled):
    """timm's distilled DeiT with attention maps that evolve from block to block.

    The arguments are those of :class:`EvolvingVisionTransformer` and timm's class; the token and
    head of the distillation are timm's.
    """


MODELS = {
    "ea_deit_tiny_patch16_224": TINY,
    "ea_deit_small_patch16_224": SMALL,
    "ea_deit_base_patch16_224": BASE,
    "ea_deit_tiny_distilled_patch16_224": TINY,
    "ea_deit_small_distilled_patch16_224": SMALL,
    "ea_deit_base_distilled_patch16_224": BASE,
    "ea_deit_tiny": TINY,
    "ea_deit_small": SMALL,
    "ea_deit_base": BASE,
    "ea_deit_tiny_distilled": TINY,
    "ea_deit_small_distilled": SMALL,
    "ea_deit_base_distilled": BASE,
}


def _cfg(name: str) -> Dict[str, Any]:
    classifier = ("head", "head_dist") if "distilled" in name else "head"
    return cfg(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, classifier=classifier)


default_cfgs = generate_default_cfgs({name: _cfg(name) for name in MODELS})


for name, sizes in MODELS.items():
    globals()[name] = entrypoint(
        __name__,
        name,
        EvolvingVisionTransformerDistilled if "distilled" in name else EvolvingVisionTransformer,
        pretrained_filter_fn=partial(checkpoint_filter_fn, adapt_layer_scale=True),
        out_indices=3,
        **sizes,
    )
