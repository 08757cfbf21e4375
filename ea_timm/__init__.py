"""Evolving attention for timm: ``import ea_timm`` registers the ``ea_*`` models.

They are then used like timm's own: ``timm.create_model("ea_deit_small")``,
``train.py --device-modules ea_timm --model ea_deit_small``, and, for those of timm's scripts that
do not import other modules, ``python -m ea_timm.run validate.py ...``.
"""

from ea_timm import deit, resnet, vision_transformer
from ea_timm.attention2d import AugmentedConv2d, EvolvingAttention2d
from ea_timm.deit import EvolvingVisionTransformerDistilled
from ea_timm.layers import EvolvingAttention, EvolvingBlock
from ea_timm.resnet import EvolvingBasicBlock, EvolvingBottleneck, EvolvingResNet
from ea_timm.vision_transformer import EvolvingVisionTransformer

__all__ = [
    "AugmentedConv2d",
    "EvolvingAttention",
    "EvolvingAttention2d",
    "EvolvingBasicBlock",
    "EvolvingBlock",
    "EvolvingBottleneck",
    "EvolvingResNet",
    "EvolvingVisionTransformer",
    "EvolvingVisionTransformerDistilled",
    "deit",
    "resnet",
    "vision_transformer",
]
