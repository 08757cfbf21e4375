"""``ea_dc_transformer``: dilated causal convolutions beside evolving attention, for time series."""

import inspect
from dataclasses import dataclass, field
from typing import Optional

from fairseq.dataclass import ChoiceEnum
from fairseq.models import BaseFairseqModel, register_model
from fairseq.tasks import FairseqTask
from torch import Tensor, nn

from ea_fairseq.models.options import EvolutionConfig, check_evolution
from evolving_attention.loading import StartsFromPlainWeights

# As in ea_aeon.network, which cannot be imported without aeon.
POSITIONS = ("none", "sinusoidal", "learned")
READOUTS = ("segments", "mean", "flatten")


@dataclass
class EADCTransformerConfig(EvolutionConfig):
    ea_alpha: float = field(
        default=0.3,
        metadata={"help": "weight of the previous layer's map, 0 to 1 (default: 0.3)"},
    )
    ea_beta: float = field(
        default=0.5,
        metadata={"help": "weight of the convolution over the map, 0 to 1 (default: 0.5)"},
    )
    d_model: int = field(default=64, metadata={"help": "width of the network (default: 64)"})
    ffn_dim: int = field(
        default=128, metadata={"help": "width inside the feed-forward networks (default: 128)"}
    )
    num_blocks: int = field(
        default=4,
        metadata={"help": "blocks; the dilation doubles from block to block (default: 4)"},
    )
    num_heads: int = field(default=2, metadata={"help": "attention heads (default: 2)"})
    attention_dim: int = field(
        default=16,
        metadata={
            "help": "channels that attention computes, 0 for only convolutions (default: 16)"
        },
    )
    key_dim: Optional[int] = field(
        default=None,
        metadata={"help": "channels of queries and keys (default: as many as --attention-dim)"},
    )
    kernel_size: int = field(
        default=3, metadata={"help": "steps that the convolutions over time see (default: 3)"}
    )
    max_distance: int = field(
        default=128,
        metadata={"help": "steps farther apart share a relative position (default: 128)"},
    )
    positions: ChoiceEnum(POSITIONS) = field(
        default="sinusoidal",
        metadata={"help": "what is added to the projected series at each step"},
    )
    readout: ChoiceEnum(READOUTS) = field(
        default="segments",
        metadata={
            "help": "what the last layer sees: means over parts of the series (segments), over all "
            "steps (mean), or every step (flatten)"
        },
    )
    num_segments: int = field(
        default=4, metadata={"help": "parts of a series for --readout segments (default: 4)"}
    )
    dropout: float = field(default=0.1, metadata={"help": "default: 0.1"})
    map_dropout: float = field(
        default=0.0, metadata={"help": "dropout of the maps handed on (default: 0)"}
    )
    causal: bool = field(default=False, metadata={"help": "attention sees only earlier steps, too"})
    checkpoint_activations: bool = field(
        default=False, metadata={"help": "recompute attention in the backward pass to save memory"}
    )


@register_model("ea_dc_transformer", dataclass=EADCTransformerConfig)
class EADCTransformerModel(BaseFairseqModel, StartsFromPlainWeights):
    """The network of :mod:`ea_aeon.network` as a fairseq model, for the ``time_series`` task."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @classmethod
    def build_model(cls, cfg: EADCTransformerConfig, task: FairseqTask) -> "EADCTransformerModel":
        """Builds the model. Raises ValueError, naming the option, if that is impossible."""
        # aeon, which ea_aeon needs, is installed only for time series.
        from ea_aeon.network import DCTransformer

        check_evolution(cfg)
        same = inspect.signature(DCTransformer).parameters
        try:
            network = DCTransformer(
                in_channels=task.preparation.num_channels,
                out_features=task.num_outputs,
                max_length=task.max_length,
                **{name: getattr(cfg, name) for name in same if hasattr(cfg, name)},
                alpha=cfg.ea_alpha,
                beta=cfg.ea_beta,
                evolution_kernel_size=cfg.ea_kernel_size,
                learnable=cfg.ea_learnable,
            )
        except ValueError as error:
            raise ValueError(f"--{str(error).replace('_', '-', 1)}") from None
        return cls(network)

    def forward(self, series: Tensor, lengths: Tensor) -> Tensor:
        """Series (batch, steps, channels) and their lengths -> (batch, outputs)."""
        # With --fp16, fairseq converts the model's weights, but not all samples.
        series = series.to(next(self.parameters()).dtype)
        return self.network(series, lengths)
