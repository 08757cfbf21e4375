from ea_fairseq.modules.multihead_attention import EvolvingMultiheadAttention
from ea_fairseq.modules.transformer import EvolvingTransformerDecoder, EvolvingTransformerEncoder
from ea_fairseq.modules.transformer_layer import (
    EvolvingTransformerDecoderLayer,
    EvolvingTransformerEncoderLayer,
)

__all__ = [
    "EvolvingMultiheadAttention",
    "EvolvingTransformerDecoder",
    "EvolvingTransformerDecoderLayer",
    "EvolvingTransformerEncoder",
    "EvolvingTransformerEncoderLayer",
]
