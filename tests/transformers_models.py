"""Tiny models of transformers with random weights, for the tests of ea_transformers."""

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", minversion="5.24", reason="transformers is not installed"
)

import ea_transformers  # noqa: E402

VOCABULARY = 60
PAD = 0
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
    "pad_token_id": PAD,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 3,
    "num_heads": 4,
    "decoder_start_token_id": PAD,
    "eos_token_id": 1,
}
SIZES = {"bert": ENCODER, "roberta": ENCODER, "t5": T5}
NAMES = {"bert": "Bert", "roberta": "Roberta", "t5": "T5"}
HEADS = {
    "bert": (
        "Model",
        "ForPreTraining",
        "ForMaskedLM",
        "ForNextSentencePrediction",
        "ForSequenceClassification",
        "ForMultipleChoice",
        "ForTokenClassification",
        "ForQuestionAnswering",
    ),
    "roberta": (
        "Model",
        "ForMaskedLM",
        "ForSequenceClassification",
        "ForMultipleChoice",
        "ForTokenClassification",
        "ForQuestionAnswering",
    ),
    "t5": (
        "Model",
        "EncoderModel",
        "ForConditionalGeneration",
        "ForSequenceClassification",
        "ForTokenClassification",
        "ForQuestionAnswering",
    ),
}
ALL_HEADS = [(host, head) for host, heads in HEADS.items() for head in heads]

EVOLVING = {"ea_alpha": 0.3, "ea_beta": 0.4}
OFF = {"ea_alpha": 0.0, "ea_beta": 0.0}
VARIANTS = [
    EVOLVING,
    {**EVOLVING, "ea_kernel_size": 5},
    {**EVOLVING, "ea_learnable": True},
    {"ea_alpha": 0.5, "ea_beta": 0.0},
    {"ea_alpha": 0.0, "ea_beta": 0.5},
    {**EVOLVING, "ea_kernel_size": 1},
]


def plain(host, head, seed=0, attn_implementation="eager", **options):
    """transformers' own model, evaluating."""
    config = getattr(transformers, f"{NAMES[host]}Config")(**{**SIZES[host], **options})
    model_class = getattr(transformers, f"{NAMES[host]}{head}")
    torch.manual_seed(seed)
    model = model_class._from_config(config, attn_implementation=attn_implementation).eval()
    return sharpen(model)


def evolving(host, head, seed=0, **options):
    """Our model with the weights of :func:`plain`, evaluating."""
    config = getattr(ea_transformers, f"EA{NAMES[host]}Config")(
        **{**SIZES[host], **EVOLVING, **options}
    )
    torch.manual_seed(seed)
    model = getattr(ea_transformers, f"EA{NAMES[host]}{head}")(config).eval()
    sizes = {name: x for name, x in options.items() if not name.startswith("ea_")}
    missing, unexpected = model.load_state_dict(
        plain(host, head, seed, **sizes).state_dict(), strict=False
    )
    assert not unexpected
    assert all(".evolution." in name for name in missing)
    return model


def sharpen(model):
    """Gives the maps, which are nearly flat at initialisation, a shape."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("query.weight", "key.weight", ".q.weight", ".k.weight")):
                parameter.mul_(8 if "query" in name or "key" in name else 2)
    return model


def tokens(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def inputs_for(host, head, batch=2, length=9, seed=0, left=False):
    """Inputs of any head, in which the second sentence is padded."""
    input_ids = tokens(batch, length, seed)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :3] = 0
    if not left:
        attention_mask = attention_mask.flip(1)
    input_ids = input_ids.masked_fill(attention_mask.eq(0), PAD)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if head == "ForMultipleChoice":
        inputs = {name: x[:, None].repeat(1, 3, 1) for name, x in inputs.items()}
        inputs["input_ids"][:, 1] = inputs["input_ids"][:, 1].flip(-1)
    if host == "t5" and head == "ForSequenceClassification":
        last = attention_mask.cumsum(1).argmax(1)
        input_ids[torch.arange(batch), last] = 1
    if host == "t5" and head in ("Model", "ForConditionalGeneration"):
        inputs["decoder_input_ids"] = tokens(batch, 6, seed + 1)
    return inputs


def first_output(outputs):
    """The main result of any head, to compare."""
    for name in ("logits", "start_logits", "prediction_logits", "last_hidden_state"):
        if name in outputs:
            return outputs[name]
    raise AssertionError(list(outputs))
