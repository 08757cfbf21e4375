"""fairseq's encoder and decoder, which hand each layer's maps to the next.

The loops over the layers replace fairseq's, because maps flow there: they are plain values, so that
activation checkpointing, layer drop and TorchScript need nothing special.
"""

from typing import Dict, List, Optional, Tuple

import torch
from fairseq.distributed import fsdp_wrap
from fairseq.models.transformer import TransformerDecoderBase, TransformerEncoderBase
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from torch import Tensor, nn

from ea_fairseq.modules.multihead_attention import keep_dropout_name
from ea_fairseq.modules.transformer_layer import (
    EvolvingTransformerDecoderLayer,
    EvolvingTransformerEncoderLayer,
)


def wrap_layer(layer: nn.Module, cfg) -> nn.Module:
    """Activation checkpointing and FSDP around a layer, as fairseq's ``build_*_layer`` do."""
    if cfg.checkpoint_activations:
        layer = checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
    # fairseq wraps checkpointed layers of any size.
    min_params = 0 if cfg.checkpoint_activations else cfg.min_params_to_wrap
    return fsdp_wrap(layer, min_num_params=min_params)


class EvolvingTransformerEncoder(TransformerEncoderBase):
    """fairseq's transformer encoder whose self-attention maps evolve from layer to layer."""

    def __init__(self, cfg, dictionary, embed_tokens, return_fc: bool = False) -> None:
        self.layers_built = 0
        super().__init__(cfg, dictionary, embed_tokens, return_fc=return_fc)
        keep_dropout_name(self, "TransformerEncoder")

    def build_encoder_layer(self, cfg) -> nn.Module:
        first = self.layers_built == 0
        self.layers_built += 1
        layer = EvolvingTransformerEncoderLayer(cfg, return_fc=self.return_fc, first=first)
        return wrap_layer(layer, cfg)

    def forward_scriptable(
        self,
        src_tokens,
        src_lengths: Optional[Tensor] = None,
        return_all_hiddens: bool = False,
        token_embeddings: Optional[Tensor] = None,
    ) -> Dict[str, List[Tensor]]:
        """As in fairseq: the same arguments, the same dictionary."""
        padding_mask = src_tokens.eq(self.padding_idx)
        has_pads = bool(src_tokens.device.type == "xla") or bool(padding_mask.any())

        x, embedding = self.forward_embedding(src_tokens, token_embeddings)
        if has_pads:
            x = x.masked_fill(padding_mask.unsqueeze(-1), 0.0)
        x = x.transpose(0, 1)  # B x T x C -> T x B x C

        encoder_states: List[Tensor] = []
        fc_results: List[Tensor] = []
        if return_all_hiddens:
            encoder_states.append(x)
        attn_logits: Optional[Tensor] = None
        for layer in self.layers:
            x, attn_logits, fc_result = layer(
                x,
                encoder_padding_mask=padding_mask if has_pads else None,
                prev_attn_logits=attn_logits,
            )
            if return_all_hiddens and not torch.jit.is_scripting():
                encoder_states.append(x)
                fc_results.append(fc_result)
        if self.layer_norm is not None:
            x = self.layer_norm(x)

        lengths = src_tokens.ne(self.padding_idx).sum(dim=1, dtype=torch.int32)
        return {
            "encoder_out": [x],  # T x B x C
            "encoder_padding_mask": [padding_mask],  # B x T
            "encoder_embedding": [embedding],  # B x T x C
            "encoder_states": encoder_states,  # List[T x B x C]
            "fc_results": fc_results,  # List[T x B x C]
            "src_tokens": [],
            "src_lengths": [lengths.reshape(-1, 1).contiguous()],
        }


class EvolvingTransformerDecoder(TransformerDecoderBase):
    """fairseq's transformer decoder whose maps, self and encoder-decoder, evolve."""

    def __init__(
        self, cfg, dictionary, embed_tokens, no_encoder_attn: bool = False, output_projection=None
    ) -> None:
        self.layers_built = 0
        super().__init__(
            cfg,
            dictionary,
            embed_tokens,
            no_encoder_attn=no_encoder_attn,
            output_projection=output_projection,
        )
        keep_dropout_name(self, "TransformerDecoder")

    def build_decoder_layer(self, cfg, no_encoder_attn: bool = False) -> nn.Module:
        first = self.layers_built == 0
        self.layers_built += 1
        return wrap_layer(EvolvingTransformerDecoderLayer(cfg, no_encoder_attn, first=first), cfg)

    def extract_features_scriptable(
        self,
        prev_output_tokens,
        encoder_out: Optional[Dict[str, List[Tensor]]],
        incremental_state: Optional[Dict[str, Dict[str, Optional[Tensor]]]] = None,
        full_context_alignment: bool = False,
        alignment_layer: Optional[int] = None,
        alignment_heads: Optional[int] = None,
    ):
        """As in fairseq: the same arguments, the same pair of features and dictionary."""
        if alignment_layer is None:
            alignment_layer = self.num_layers - 1

        enc: Optional[Tensor] = None
        enc_padding_mask: Optional[Tensor] = None
        if encoder_out is not None and len(encoder_out["encoder_out"]) > 0:
            enc = encoder_out["encoder_out"][0]
        if encoder_out is not None and len(encoder_out["encoder_padding_mask"]) > 0:
            enc_padding_mask = encoder_out["encoder_padding_mask"][0]

        x, tokens = self.embed(prev_output_tokens, incremental_state)
        self_attn_padding_mask: Optional[Tensor] = None
        if tokens.eq(self.padding_idx).any():
            self_attn_padding_mask = tokens.eq(self.padding_idx)
        self_attn_mask: Optional[Tensor] = None
        if incremental_state is None and not full_context_alignment:
            self_attn_mask = self.buffered_future_mask(x).to(torch.bool)

        attn: Optional[Tensor] = None
        self_attn_logits: Optional[Tensor] = None
        encoder_attn_logits: Optional[Tensor] = None
        inner_states: List[Optional[Tensor]] = [x]
        for index, layer in enumerate(self.layers):
            x, layer_attn, self_attn_logits, encoder_attn_logits = layer(
                x,
                enc,
                enc_padding_mask,
                incremental_state,
                self_attn_mask=self_attn_mask,
                self_attn_padding_mask=self_attn_padding_mask,
                need_attn=bool(index == alignment_layer),
                need_head_weights=bool(index == alignment_layer),
                prev_self_attn_logits=self_attn_logits,
                prev_encoder_attn_logits=encoder_attn_logits,
            )
            inner_states.append(x)
            if layer_attn is not None and index == alignment_layer:
                attn = layer_attn.float().to(x)
        if attn is not None:
            if alignment_heads is not None:
                attn = attn[:alignment_heads]
            attn = attn.mean(dim=0)  # over heads

        if self.layer_norm is not None:
            x = self.layer_norm(x)
        x = x.transpose(0, 1)  # T x B x C -> B x T x C
        if self.project_out_dim is not None:
            x = self.project_out_dim(x)
        return x, {"attn": [attn], "inner_states": inner_states}

    def embed(
        self,
        tokens: Tensor,
        incremental_state: Optional[Dict[str, Dict[str, Optional[Tensor]]]],
    ) -> Tuple[Tensor, Tensor]:
        """Embeds tokens (batch, tgt_len), or with an incremental state only the last ones.

        Returns (tgt_len, batch, embed_dim) and the tokens that were embedded.
        """
        positions: Optional[Tensor] = None
        if self.embed_positions is not None:
            positions = self.embed_positions(tokens, incremental_state=incremental_state)
        if incremental_state is not None:
            tokens = tokens[:, -1:]
            if positions is not None:
                positions = positions[:, -1:]
        tokens = tokens.contiguous()
        x = self.embed_scale * self.embed_tokens(tokens)
        if self.quant_noise is not None:
            x = self.quant_noise(x)
        if self.project_in_dim is not None:
            x = self.project_in_dim(x)
        if positions is not None:
            x = x + positions
        if self.layernorm_embedding is not None:
            x = self.layernorm_embedding(x)
        return self.dropout_module(x).transpose(0, 1), tokens
