"""Creates the ``ea_*`` models for timm's registry."""

from typing import Any, Callable, Tuple, Type, Union

from timm.models import FeatureGraphNet, build_model_with_cfg, register_model
from timm.models._features import FeatureGetterNet
from torch import nn


class EvolvingFeatures(FeatureGetterNet):
    """timm's features from ``forward_intermediates``, with gradient checkpointing."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass, or keep its activations."""
        self.model.set_grad_checkpointing(enable)


def build_evolving(
    model_cls: Type[nn.Module],
    variant: str,
    pretrained: bool,
    out_indices: Union[int, Tuple[int, ...]],
    **kwargs: Any,
) -> nn.Module:
    """timm's `build_model_with_cfg`; with `features_only` it returns :class:`EvolvingFeatures`.

    Raises:
        ValueError: `feature_cls` is one of timm's ways to call the children of the model one
            after the other with the features alone, or `use_naflex` asks for another model.
    """
    if kwargs.pop("use_naflex", False):
        raise ValueError(f"use_naflex must be False for {variant}: NaFlexVit hands no maps on")
    feature_cls = kwargs.pop("feature_cls", "getter")
    if feature_cls not in ("getter", "fx", FeatureGetterNet, FeatureGraphNet):
        raise ValueError(
            f"feature_cls must be 'getter' or 'fx' for {variant}, because maps flow between its "
            f"blocks beside the features, got {feature_cls!r}"
        )
    if feature_cls == "getter":
        feature_cls = EvolvingFeatures
    feature_cfg = dict(out_indices=out_indices, feature_cls=feature_cls)
    model = build_model_with_cfg(model_cls, variant, pretrained, feature_cfg=feature_cfg, **kwargs)
    model.pretrained_cfg["architecture"] = variant  # it may be that of a plain model
    return model


def entrypoint(
    module: str, name: str, model_cls: Type[nn.Module], **model_args: Any
) -> Callable[..., nn.Module]:
    """Registers a function that creates the model `name` with timm, and returns it.

    Args:
        module: name of the module that has the model's `default_cfgs`.
        name: of the model and the function.
        model_cls: of the model.
        model_args: defaults of the arguments for :func:`build_evolving`.
    """

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_evolving(model_cls, name, pretrained, **{**model_args, **kwargs})

    create.__module__ = module
    create.__name__ = create.__qualname__ = name
    return register_model(create)
