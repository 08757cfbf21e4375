"""What the ``ea_*`` models share: how they are built, and how they load weights."""

from typing import Any, Collection, Iterable, Optional

import torch
from torch import nn
from transformers import PreTrainedModel

from ea_transformers.configuration import NAME, REPLACED, EvolvingConfig
from evolving_attention import AttentionEvolution
from evolving_attention.modules import is_number, is_rounded, shortest_number


class EvolvingPreTrainedModel(PreTrainedModel):
    """A model of transformers with evolving attention in some of its parts.

    It comes before transformers' class in the list of bases.

    Raises:
        TypeError: the configuration is that of a plain model.
        ValueError: one of its options is out of range.
    """

    has_evolving_parts = False

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(config, EvolvingConfig):
            name = self.config_class.__name__
            raise TypeError(
                f"config must be an {name}, got a {type(config).__name__}: make it with "
                f"{name}.from_pretrained(...), which also reads that of a plain model"
            )
        config.check_evolution()
        given = config.__dict__.pop("_ea_given", [])
        checkpointing = getattr(config, "gradient_checkpointing", False)
        with torch.device("meta"):  # what build_evolving replaces would cost time and memory
            super().__init__(config, *args, **kwargs)
        if checkpointing:  # in old configurations, from which transformers' constructors delete it
            config.gradient_checkpointing = True
        self.build_evolving()
        self.has_evolving_parts = True
        self.given_options = given
        device = device_of_new_parameters()
        for module in self.modules():
            if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                module.to_empty(device=device, recurse=False)
        self.post_init()

    def post_init(self) -> None:
        """As in transformers, but only once the evolving parts exist: otherwise names of plain ones
        would stay in `_no_split_modules`, by which FSDP chooses layers to wrap."""
        if self.has_evolving_parts:
            super().post_init()

    def build_evolving(self) -> None:
        """Replaces the parts in which maps evolve; their weights are initialised afterwards."""
        raise NotImplementedError

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, AttentionEvolution):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def get_correct_attn_implementation(
        self, requested_attention: Optional[str], is_init_check: bool = False
    ) -> str:
        """The map-keeping attention, in place of the eager one and of the default.

        Raises:
            ValueError: another one is asked for.
        """
        if requested_attention not in (None, *REPLACED, NAME):
            raise ValueError(
                f"attn_implementation must be left out, 'eager' or 'sdpa', got "
                f"{requested_attention!r}: attention maps evolve from layer to layer, and no fused "
                "kernel returns its map. For all three, the model computes the map itself"
            )
        return NAME

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: Optional[str], *args: Any, **kwargs: Any
    ) -> str:
        """Asks nothing else, where transformers would also look for kernels."""
        return self.get_correct_attn_implementation(attn_implementation)

    @classmethod
    def from_pretrained(
        cls,
        *args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers. The weights may be those of the plain model, too.

        Raises:
            ValueError: the weights were trained with another alpha, beta or kernel size, or with
                evolving attention where the model has none; the message names the option.
            RuntimeError: another weight has another shape, unless ignore_mismatched_sizes=True.
        """
        model, info = super().from_pretrained(
            *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        if isinstance(kwargs.get("config"), EvolvingConfig):  # of which the model has a copy
            kwargs["config"].__dict__.pop("_ea_given", None)
        check_unexpected(model, info["unexpected_keys"])
        check_shapes(info["mismatched_keys"], ignore_mismatched_sizes)
        for name, module in model.named_modules():
            if isinstance(module, AttentionEvolution):
                check_mixing(name, module, model.given_options)
        return (model, info) if output_loading_info else model


def device_of_new_parameters() -> torch.device:
    """The default device, or meta within accelerate's ``init_empty_weights``."""
    module = nn.Module()
    module.register_parameter("probe", nn.Parameter(torch.empty(0)))
    return module.probe.device


def check_unexpected(model: PreTrainedModel, unexpected: Iterable[str]) -> None:
    """Raises ValueError if the weights evolve a map that the model does not evolve."""
    base = f"{model.base_model_prefix}."  # stands before the names of a model with a head
    attentions = {
        name.removeprefix(base)
        for name, module in model.named_modules()
        if hasattr(module, "evolution")
    }
    for key in sorted(unexpected):
        attention, found, _ = key.removeprefix(base).partition(".evolution.")
        if found and attention in attentions:
            raise ValueError(
                f"the checkpoint was trained with evolving attention (it has {key}), for which "
                f"this {type(model).__name__} has no place: leave out ea_alpha, ea_beta and the "
                "other ea_ options, to take those of the checkpoint"
            )


def check_shapes(mismatched: Iterable[Any], ignore: bool) -> None:
    """Raises an error if weights have other shapes in the checkpoint than in the model.

    Args:
        mismatched: triples of a name and the two shapes.
        ignore: allow it, except for the convolutions over the maps.

    Raises:
        ValueError: the convolutions were trained with another kernel size.
        RuntimeError: the shape of another weight differs.
    """
    for key, stored, own in sorted(mismatched):
        if key.endswith(".evolution.weight") and stored[:2] == own[:2]:
            raise ValueError(
                f"{key} was trained with a kernel size of {stored[-1]}, but this model was made "
                f"with ea_kernel_size={own[-1]}: leave ea_kernel_size out, to take the checkpoint's"
            )
        if not ignore:
            raise RuntimeError(
                f"{key} has shape {tuple(stored)} in the checkpoint and {tuple(own)} in this model "
                "(see the report above): give ignore_mismatched_sizes=True, to begin such weights "
                "anew"
            )


def check_mixing(name: str, evolution: AttentionEvolution, given: Collection[str]) -> None:
    """Raises ValueError if the loaded alpha or beta are others than they should be.

    Args:
        name: of the evolution in the model.
        given: the options that the caller gave. Other learned numbers may be any, and other fixed
            ones must be those of the configuration.
    """
    for option, number in zip(("alpha", "beta"), evolution.mixing, strict=True):
        stored = getattr(evolution, option).detach()
        if (evolution.learnable and f"ea_{option}" not in given) or not is_number(stored):
            continue
        if not is_rounded(number, stored.clamp(0.0, 1.0)):
            learnable = (
                "" if evolution.learnable else ", or give ea_learnable=True if it was learned"
            )
            raise ValueError(
                f"{name}.{option} is {shortest_number(stored)} in the checkpoint, but this model "
                f"was made with ea_{option}={number}: leave ea_{option} out, to take the "
                f"checkpoint's{learnable}"
            )
    if not evolution.learnable and not evolution.alpha.is_meta:
        evolution.reset_mixing()  # free of the rounding of a half-precision checkpoint
