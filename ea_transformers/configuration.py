"""Configurations of the ``ea_*`` models: those of transformers with the evolution's options."""

from typing import Any, Dict, Sequence, Tuple

from huggingface_hub.dataclasses import strict
from transformers import BertConfig, PreTrainedConfig, RobertaConfig, T5Config

from evolving_attention.checks import check_flag, check_kernel_size, check_unit_interval

ATTENTIONS = ("encoder", "decoder", "cross")
NAME = "evolving"  # of the attention function, in transformers' registry
REPLACED = ("eager", "sdpa")  # the functions of transformers in whose place it is used


class EvolvingConfig(PreTrainedConfig):
    """What the configurations share.

    It comes after transformers' class in the list of bases, whose defaults then hold. The decorator
    `strict` on the resulting class makes the method below that validates override transformers'.

    Args:
        ea_alpha: weight of the previous layer's map, in [0, 1].
        ea_beta: weight of the convolution over the map, in [0, 1].
        ea_kernel_size: of the convolution, odd.
        ea_learnable: learn each layer's alpha and beta, starting from the given values.
        kwargs: as in transformers.

    Raises:
        ValueError: an option is out of range, has a wrong type or does not exist; the message
            names it.
    """

    # Types are strings, since `strict` would refuse an int for a float, and not say what is right.
    ea_alpha: "float" = 0.1
    ea_beta: "float" = 0.1
    ea_kernel_size: "int" = 3
    ea_learnable: "bool" = False

    def __post_init__(self, **kwargs: Any) -> None:
        unknown = [name for name in kwargs if name.startswith("ea_")]
        if unknown:
            known = [name for name in self.__dataclass_fields__ if name.startswith("ea_")]
            raise ValueError(f"no such option: {', '.join(unknown)}; there are {', '.join(known)}")
        super().__post_init__(**kwargs)
        self.check_evolution()
        # JSON, in which configurations are saved, does not know numpy's numbers.
        self.ea_alpha, self.ea_beta = float(self.ea_alpha), float(self.ea_beta)
        self.ea_kernel_size, self.ea_learnable = int(self.ea_kernel_size), bool(self.ea_learnable)

    def check_evolution(self) -> None:
        """Raises ValueError, naming the option, if the maps of this model cannot evolve."""
        check_unit_interval("ea_alpha", self.ea_alpha)
        check_unit_interval("ea_beta", self.ea_beta)
        check_kernel_size("ea_kernel_size", self.ea_kernel_size)
        check_flag("ea_learnable", self.ea_learnable)

    @property
    def evolution(self) -> Dict[str, Any]:
        """Arguments of :class:`AttentionEvolution`; none if the maps do not evolve."""
        if not (self.ea_learnable or self.ea_alpha > 0 or self.ea_beta > 0):
            return {}
        return {
            "alpha": self.ea_alpha,
            "beta": self.ea_beta,
            "kernel_size": self.ea_kernel_size,
            "learnable": self.ea_learnable,
        }

    @PreTrainedConfig.output_attentions.setter
    def output_attentions(self, value: bool) -> None:
        """Unlike with fused kernels, the model can always return all probabilities."""
        self._output_attentions = value

    @PreTrainedConfig._attn_implementation.getter
    def _attn_implementation(self) -> Any:
        """The name of the attention function, also where a model around this one sets another."""
        name = self._attn_implementation_internal
        return NAME if name in REPLACED else name

    def validate_output_attentions(self) -> None:
        """Does nothing: transformers forbids it for all but its own eager attention."""

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> Tuple[Dict[str, Any], Dict[str, Any]]:
        """As in transformers; the configuration of a plain checkpoint is taken without a warning
        that its type is another."""
        config, unused = super().get_config_dict(*args, **kwargs)
        if f"ea_{config.get('model_type')}" == cls.model_type:
            config["model_type"] = cls.model_type
        return config, unused

    @classmethod
    def from_dict(cls, config_dict: Dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, which would set the options in `kwargs` without checking them.

        The result has their names in `_ea_given`, until a model is made or loaded with it.
        """
        names = [name for name in kwargs if name.startswith("ea_")]
        given = {name: kwargs.pop(name) for name in names}
        result = super().from_dict({**config_dict, **given}, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        config._ea_given = names
        return result

    def to_dict(self) -> Dict[str, Any]:
        """As in transformers."""
        return {name: value for name, value in super().to_dict().items() if name != "_ea_given"}


class EvolvingEncoderConfig(EvolvingConfig):
    """A configuration of an encoder such as BERT."""

    def check_evolution(self) -> None:
        super().check_evolution()
        for name in ("is_decoder", "add_cross_attention"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} must be False, got True: {self.model_type} is an encoder; of the "
                    "ea_* models, ea_t5 has a decoder"
                )


@strict
class EABertConfig(BertConfig, EvolvingEncoderConfig):
    """transformers' BertConfig with the options of :class:`EvolvingConfig`."""

    model_type = "ea_bert"


@strict
class EARobertaConfig(RobertaConfig, EvolvingEncoderConfig):
    """transformers' RobertaConfig with the options of :class:`EvolvingConfig`."""

    model_type = "ea_roberta"


@strict
class EAT5Config(T5Config, EvolvingConfig):
    """transformers' T5Config with the options of :class:`EvolvingConfig`.

    Args:
        ea_attentions: which attentions evolve, of "encoder" (its self-attention), "decoder"
            (likewise) and "cross" (encoder-decoder attention).
    """

    model_type = "ea_t5"

    ea_attentions: "Sequence[str]" = ATTENTIONS

    def check_evolution(self) -> None:
        super().check_evolution()
        named = self.ea_attentions
        if (
            isinstance(named, str)
            or not isinstance(named, Sequence)
            or not named
            or any(name not in ATTENTIONS for name in named)
        ):
            raise ValueError(
                f"ea_attentions must be a list of one or more of {', '.join(ATTENTIONS)}, got "
                f"{named!r}"
            )

    @property
    def needs_rows(self) -> bool:
        """Whether incremental decoding needs rows of earlier maps, for the convolution."""
        convolves = (self.ea_learnable or self.ea_beta > 0) and self.ea_kernel_size > 1
        return convolves and set(self.ea_attentions) != {"encoder"}
