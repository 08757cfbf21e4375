"""fairseq's transformer layers, which take the previous layer's maps and return their own."""

from typing import Any, Dict, Optional, Tuple

import torch
from fairseq.modules.transformer_layer import (
    TransformerDecoderLayerBase,
    TransformerEncoderLayerBase,
)
from torch import Tensor, nn

from ea_fairseq.modules.multihead_attention import (
    EvolvingMultiheadAttention,
    PlainMultiheadAttention,
    keep_dropout_name,
)
from evolving_attention import AttentionEvolution

# For each attention that --ea-attentions names, how the convolution over its map looks around.
WINDOWS = {"encoder": "bidirectional", "decoder": "causal", "cross": "cross"}
# Future cells are masked, so that this window of a decoder does not see the future either.
CENTRED_KEYS = "cross"


def build_attention(
    layer: nn.Module, cfg, attention: str, embed_dim: int, num_heads: int, **options: Any
) -> EvolvingMultiheadAttention:
    """One attention of a layer: evolving if the options say so, else fairseq's own.

    Args:
        layer: its `first` says whether it is the first of its stack, which has no map to evolve.
        attention: "encoder", "decoder" (self-attention) or "cross".
        options: of fairseq's attention, besides those that it takes from the layer.
    """
    options["dropout"] = cfg.attention_dropout
    options["q_noise"] = layer.quant_noise
    options["qn_block_size"] = layer.quant_noise_block_size
    mixes = cfg.ea_learnable or cfg.ea_alpha > 0 or cfg.ea_beta > 0
    if not mixes or attention not in cfg.ea_attentions.split(","):
        return PlainMultiheadAttention(embed_dim, num_heads, **options)
    evolution = None
    if not layer.first:
        centred = attention == "decoder" and cfg.ea_keys == "centred"
        evolution = AttentionEvolution(
            num_heads,
            cfg.ea_alpha,
            cfg.ea_beta,
            cfg.ea_kernel_size,
            CENTRED_KEYS if centred else WINDOWS[attention],
            cfg.ea_learnable,
        )
    return EvolvingMultiheadAttention(embed_dim, num_heads, evolution=evolution, **options)


class EvolvingTransformerEncoderLayer(TransformerEncoderLayerBase):
    """fairseq's encoder layer; :meth:`forward` takes a map and returns the evolved one.

    Args:
        first: the first layer of its stack has no map to evolve from, and no weights for it.
    """

    def __init__(self, cfg, return_fc: bool = False, first: bool = False) -> None:
        self.first = first
        super().__init__(cfg, return_fc=return_fc)
        keep_dropout_name(self, TransformerEncoderLayerBase.__name__)

    def build_self_attention(self, embed_dim: int, cfg) -> EvolvingMultiheadAttention:
        heads = cfg.encoder.attention_heads
        return build_attention(self, cfg, "encoder", embed_dim, heads, self_attention=True)

    def forward(
        self,
        x: Tensor,
        encoder_padding_mask: Optional[Tensor],
        attn_mask: Optional[Tensor] = None,
        prev_attn_logits: Optional[Tensor] = None,
    ) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
        """As in fairseq; `prev_attn_logits` is the map of the previous layer.

        Returns:
            The output, (src_len, batch, embed_dim); the map to hand on, (batch, heads, src_len,
            src_len), or None; the output of the feed-forward part if `return_fc`, else None.
        """
        if attn_mask is not None:
            attn_mask = attn_mask.to(torch.bool)
        residual = x
        if self.normalize_before:
            x = self.self_attn_layer_norm(x)
        x, _, attn_logits = self.self_attn(
            query=x,
            key=x,
            value=x,
            key_padding_mask=encoder_padding_mask,
            need_weights=False,
            attn_mask=attn_mask,
            prev_attn_logits=prev_attn_logits,
        )
        x = self.residual_connection(self.dropout_module(x), residual)
        if not self.normalize_before:
            x = self.self_attn_layer_norm(x)

        residual = x
        if self.normalize_before:
            x = self.final_layer_norm(x)
        fc_result = self.fc2(self.activation_dropout_module(self.activation_fn(self.fc1(x))))
        x = self.residual_connection(self.dropout_module(fc_result), residual)
        if not self.normalize_before:
            x = self.final_layer_norm(x)
        return x, attn_logits, fc_result if self.return_fc else None


class EvolvingTransformerDecoderLayer(TransformerDecoderLayerBase):
    """fairseq's decoder layer; :meth:`forward` takes two maps and returns the evolved ones.

    Args:
        first: the first layer of its stack has no maps to evolve from, and no weights for it.
    """

    def __init__(self, cfg, no_encoder_attn: bool = False, first: bool = False) -> None:
        self.first = first
        super().__init__(cfg, no_encoder_attn=no_encoder_attn)
        keep_dropout_name(self, TransformerDecoderLayerBase.__name__)

    def build_self_attention(
        self, embed_dim: int, cfg, add_bias_kv: bool = False, add_zero_attn: bool = False
    ) -> EvolvingMultiheadAttention:
        if add_bias_kv or add_zero_attn:
            raise ValueError(
                "add_bias_kv and add_zero_attn must be False: a key without a position has no "
                "neighbours in the map"
            )
        heads = cfg.decoder.attention_heads
        return build_attention(self, cfg, "decoder", embed_dim, heads, self_attention=True)

    def build_encoder_attention(self, embed_dim: int, cfg) -> EvolvingMultiheadAttention:
        return build_attention(
            self,
            cfg,
            "cross",
            embed_dim,
            cfg.decoder.attention_heads,
            kdim=cfg.encoder.embed_dim,
            vdim=cfg.encoder.embed_dim,
            encoder_decoder_attention=True,
        )

    def make_generation_fast_(self, need_attn: Optional[bool] = False, **kwargs: Any) -> None:
        """As in fairseq, whose hub interface gives None, with which TorchScript fails."""
        super().make_generation_fast_(need_attn=bool(need_attn), **kwargs)

    def forward(
        self,
        x: Tensor,
        encoder_out: Optional[Tensor] = None,
        encoder_padding_mask: Optional[Tensor] = None,
        incremental_state: Optional[Dict[str, Dict[str, Optional[Tensor]]]] = None,
        self_attn_mask: Optional[Tensor] = None,
        self_attn_padding_mask: Optional[Tensor] = None,
        need_attn: bool = False,
        need_head_weights: bool = False,
        prev_self_attn_logits: Optional[Tensor] = None,
        prev_encoder_attn_logits: Optional[Tensor] = None,
    ) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
        """As in fairseq; `self_attn_mask` is bool, and the `prev_*_logits` are the maps of the
        previous layer.

        Returns:
            The output, (tgt_len, batch, embed_dim); the probabilities of the encoder-decoder
            attention if asked for; the maps to hand on, each None if it does not evolve: that of
            the self-attention, (batch, heads, tgt_len, tgt_len), and that of the encoder-decoder
            attention, (batch, heads, tgt_len, src_len).
        """
        residual = x
        if self.normalize_before:
            x = self.self_attn_layer_norm(x)
        x, _, self_attn_logits = self.self_attn(
            query=x,
            key=x,
            value=x,
            key_padding_mask=self_attn_padding_mask,
            incremental_state=incremental_state,
            need_weights=False,
            attn_mask=self_attn_mask,
            prev_attn_logits=prev_self_attn_logits,
        )
        if self.c_attn is not None:
            heads = x.view(x.size(0), x.size(1), self.nh, self.head_dim)
            x = (heads * self.c_attn.view(-1, 1)).flatten(2)
        if self.attn_ln is not None:
            x = self.attn_ln(x)
        x = self.residual_connection(self.dropout_module(x), residual)
        if not self.normalize_before:
            x = self.self_attn_layer_norm(x)

        attn: Optional[Tensor] = None
        encoder_attn_logits: Optional[Tensor] = None
        if self.encoder_attn is not None and encoder_out is not None:
            residual = x
            if self.normalize_before:
                x = self.encoder_attn_layer_norm(x)
            x, attn, encoder_attn_logits = self.encoder_attn(
                query=x,
                key=encoder_out,
                value=encoder_out,
                key_padding_mask=encoder_padding_mask,
                incremental_state=incremental_state,
                static_kv=True,
                need_weights=need_attn or (not self.training and self.need_attn),
                need_head_weights=need_head_weights,
                query_padding_mask=self_attn_padding_mask,
                prev_attn_logits=prev_encoder_attn_logits,
            )
            x = self.residual_connection(self.dropout_module(x), residual)
            if not self.normalize_before:
                x = self.encoder_attn_layer_norm(x)

        residual = x
        if self.normalize_before:
            x = self.final_layer_norm(x)
        x = self.activation_dropout_module(self.activation_fn(self.fc1(x)))
        if self.ffn_layernorm is not None:
            x = self.ffn_layernorm(x)
        x = self.dropout_module(self.fc2(x))
        if self.w_resid is not None:
            residual = torch.mul(self.w_resid, residual)
        x = self.residual_connection(x, residual)
        if not self.normalize_before:
            x = self.final_layer_norm(x)
        return x, attn, self_attn_logits, encoder_attn_logits
