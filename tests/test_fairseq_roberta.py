"""ea_roberta: its laws, and its equality with fairseq's RoBERTa."""

from argparse import Namespace

import pytest
import torch
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.models.roberta import RobertaModel
from fairseq.tasks.masked_lm import MaskedLMConfig, MaskedLMTask

from ea_fairseq.modules import EvolvingMultiheadAttention
from evolving_attention import reference

EVOLVING = {"ea_alpha": 0.3, "ea_beta": 0.4}
PLAIN = {"ea_alpha": 0.0, "ea_beta": 0.0}
FROM_PLAIN = {**PLAIN, "ea_learnable": True}
VARIANTS = [
    EVOLVING,
    {**EVOLVING, "ea_kernel_size": 5},
    {**EVOLVING, "ea_learnable": True},
    {"ea_alpha": 0.5, "ea_beta": 0.0},
    {"ea_alpha": 0.0, "ea_beta": 0.5},
]
TINY = {
    "encoder_layers": 3,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 64,
    "encoder_attention_heads": 4,
    "max_positions": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}


@pytest.fixture(scope="module")
def masked_lm(task):
    return MaskedLMTask(MaskedLMConfig(), task.source_dictionary)


@pytest.fixture
def build(masked_lm):
    """build(arch, **options): the tiny model that --arch with these options gives, evaluating."""

    def build_model(arch="ea_roberta", seed=0, **options):
        torch.manual_seed(seed)
        args = Namespace(**{**TINY, **options})
        ARCH_CONFIG_REGISTRY[arch](args)
        model = ARCH_MODEL_REGISTRY[arch].build_model(args, masked_lm).eval()
        with torch.no_grad():
            for attention in attentions(model):  # its initial attention is nearly uniform
                attention.q_proj.weight.mul_(50)
                attention.k_proj.weight.mul_(50)
        return model

    return build_model


def attentions(model):
    return [layer.self_attn for layer in model.encoder.sentence_encoder.layers]


def padded(tokens, length, pad, left):
    padding = tokens.new_full((tokens.size(0), length - tokens.size(1)), pad)
    return torch.cat([padding, tokens] if left else [tokens, padding], dim=1)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("arch", ["ea_roberta", "ea_roberta_prenorm", "ea_bert_base"])
@pytest.mark.parametrize("options", VARIANTS)
def test_a_sentence_alone_equals_itself_in_a_padded_batch(
    build, sentences, masked_lm, options, arch, left
):
    model = build(arch, **options)
    sentence = sentences(1, 7)
    alone = model(sentence)[0][0]
    batch = padded(sentence, 19, masked_lm.source_dictionary.pad(), left)
    out = model(torch.cat([batch, sentences(2, 19, seed=1)]))[0][0]
    torch.testing.assert_close(out[-7:] if left else out[:7], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["roberta", "roberta_prenorm"])
def test_without_evolution_it_is_fairseqs_roberta(build, sentences, masked_lm, layout):
    """Bit for bit, in initial weights and their names, logits, features and gradients."""
    plain, ours = build(layout).train(), build(f"ea_{layout}", **PLAIN).train()
    assert type(plain) is RobertaModel
    tokens = sentences(3, 9)
    tokens[1, 6:] = masked_lm.source_dictionary.pad()
    for features_only in (False, True):
        for model in (plain, ours):
            model.zero_grad()
        expected, got = (model(tokens, features_only=features_only)[0] for model in (plain, ours))
        assert torch.equal(got, expected)
        for out in (expected, got):
            out.square().mean().backward()
        weights = zip(plain.named_parameters(), ours.named_parameters(), strict=True)
        for (name, parameter), (other, own) in weights:
            assert name == other
            assert torch.equal(own, parameter), name
            same = own.grad is None if parameter.grad is None else own.grad.equal(parameter.grad)
            assert same, name


def test_learned_mixing_from_zero_starts_at_the_plain_model_and_evolves(
    build, sentences, masked_lm
):
    plain, ours = build("roberta"), build(**FROM_PLAIN)
    ours.load_state_dict(plain.state_dict())
    tokens = sentences(3, 9)
    tokens[1, 6:] = masked_lm.source_dictionary.pad()
    expected, got = plain(tokens)[0], ours(tokens)[0]
    real = tokens.ne(masked_lm.source_dictionary.pad())
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=1e-6)

    optimizer = torch.optim.Adam(ours.parameters(), lr=1e-2)
    fresh = [attention.evolution.weight.clone() for attention in attentions(ours)[1:]]
    before = None
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(ours(tokens)[0][real], tokens[real])
        before = loss.item() if before is None else before
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < before
    mixing = [
        value for a in attentions(ours)[1:] for value in (a.evolution.alpha, a.evolution.beta)
    ]
    assert any(value.item() > 0.01 for value in mixing)
    moved = [
        not torch.equal(attention.evolution.weight, weight)
        for attention, weight in zip(attentions(ours)[1:], fresh, strict=True)
    ]
    assert any(moved)


def test_maps_are_those_of_the_equations(build, sentences, masked_lm):
    model = build(**EVOLVING).double()
    tokens = sentences(2, 8)
    tokens[1, 5:] = pad = masked_lm.source_dictionary.pad()
    seen = []

    def keep(module, args, kwargs, output):
        x = kwargs["query"]
        q = module.split_heads(module.q_proj(x)) * module.head_dim**-0.5
        seen.append((q @ module.split_heads(module.k_proj(x)).transpose(2, 3), output[2]))

    for attention in attentions(model):
        assert type(attention) is EvolvingMultiheadAttention
        attention.register_forward_hook(keep, with_kwargs=True)
    model(tokens)
    hidden = tokens.eq(pad)
    mask = hidden[:, None, :, None] | hidden[:, None, None, :]
    prev = seen[0][0]
    for (logits, handed_on), attention in zip(seen[1:], attentions(model)[1:], strict=True):
        weights = (attention.evolution.weight, attention.evolution.bias, *EVOLVING.values())
        prev = reference.evolve(logits, prev, *weights, "bidirectional", mask)
        torch.testing.assert_close(handed_on, prev, rtol=0, atol=1e-9)


def gradients(model, tokens, pad):
    model.train()
    real = tokens.ne(pad)
    out = model(tokens, masked_tokens=real)[0]
    torch.nn.functional.cross_entropy(out, tokens[real].roll(1)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("options", VARIANTS)
def test_activation_checkpointing_gives_equal_gradients_to_every_parameter(
    build, sentences, masked_lm, options
):
    tokens = sentences(3, 9)
    tokens[1, 6:] = pad = masked_lm.source_dictionary.pad()
    expected = gradients(build(**options), tokens, pad)
    checkpointed = build(**options, checkpoint_activations=True)
    assert hasattr(checkpointed.encoder.sentence_encoder.layers[1], "precheckpoint_forward")
    got = gradients(checkpointed, tokens, pad)
    assert expected.keys() == got.keys()
    for name, gradient in got.items():
        assert gradient is not None and gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-7)


def test_gradients_are_those_of_finite_differences(build, sentences, masked_lm):
    model = build(**EVOLVING, ea_learnable=True).double()
    tokens = sentences(2, 6)
    tokens[1, 4:] = pad = masked_lm.source_dictionary.pad()
    real = tokens.ne(pad)

    def loss():
        features = model(tokens, features_only=True)[0][real]
        return (features * torch.arange(features.numel()).view_as(features).sin()).sum()

    loss().backward()
    evolution = attentions(model)[1].evolution
    query = attentions(model)[0].q_proj.weight
    with torch.no_grad():
        for parameter in (evolution.weight, evolution.bias, evolution.alpha, evolution.beta, query):
            index = parameter.grad.abs().argmax()
            values, step = parameter.view(-1), 1e-3
            values[index] += step
            above = loss()
            values[index] -= 2 * step
            below = loss()
            values[index] += step
            numeric = (above - below) / (2 * step)
            # fairseq's softmax and GELU compute in single precision for every model.
            torch.testing.assert_close(parameter.grad.view(-1)[index], numeric, rtol=0.01, atol=0)


def released_layout(state_dict):
    """The names of the weights in the released roberta.base and roberta.large."""
    released = {}
    for name, value in state_dict.items():
        if "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            parts = [state_dict[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            name, value = name.replace("q_proj.", "in_proj_"), torch.cat(parts)
        name = name.replace("encoder.", "decoder.", 1)
        released[name.replace("layernorm_embedding", "emb_layer_norm")] = value
    return released


@pytest.mark.parametrize("options", [PLAIN, FROM_PLAIN, EVOLVING])
def test_a_released_checkpoint_is_taken_over_whole(build, sentences, options):
    plain = build("roberta", seed=1)
    ours = build(**options)
    fresh = {name: value for name, value in ours.state_dict().items() if ".evolution." in name}
    fresh = {name: value.clone() for name, value in fresh.items()}
    ours.load_state_dict(released_layout(plain.state_dict()))
    for name, value in ours.state_dict().items():
        expected = fresh[name] if name in fresh else plain.state_dict()[name]
        assert torch.equal(value, expected), name
    tokens = sentences(2, 9)
    same = torch.allclose(ours(tokens)[0], plain(tokens)[0], atol=1e-5)
    assert same == (options is not EVOLVING)


def test_other_missing_or_surplus_weights_are_refused(build):
    state = build("roberta").state_dict()
    missing = {name: value for name, value in state.items() if "fc1" not in name}
    with pytest.raises(RuntimeError, match="Missing key.*fc1"):
        build(**EVOLVING).load_state_dict(missing)
    with pytest.raises(RuntimeError, match="Unexpected key.*surplus"):
        build(**EVOLVING).load_state_dict({**state, "encoder.surplus": torch.zeros(1)})


def test_classification_heads_are_saved_loaded_and_replaced(build, sentences):
    model = build(**EVOLVING)
    model.register_classification_head("topic", num_classes=5)
    tokens = sentences(2, 9)
    expected = model(tokens, classification_head_name="topic")[0]
    assert expected.shape == (2, 5)

    loaded = build(**EVOLVING, seed=1, load_checkpoint_heads=True)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(tokens, classification_head_name="topic")[0], expected)

    other = build(**EVOLVING, seed=1)
    other.register_classification_head("topic", num_classes=2)
    fresh = other.classification_heads["topic"].out_proj.weight.clone()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.classification_heads["topic"].out_proj.weight, fresh)


def test_layer_drop_trains(build, sentences):
    model = build(**EVOLVING, encoder_layers=6, encoder_layerdrop=0.9).train()
    for _ in range(5):
        loss = model(sentences(2, 9))[0].square().mean()
        loss.backward()
        assert torch.isfinite(loss)


@pytest.mark.parametrize(
    ("arch", "layers", "width", "ffn", "heads"),
    [
        ("ea_roberta", 12, 768, 3072, 12),
        ("ea_roberta_base", 12, 768, 3072, 12),
        ("ea_bert_base", 12, 768, 3072, 12),
        ("ea_roberta_large", 24, 1024, 4096, 16),
        ("ea_bert_large", 24, 1024, 4096, 16),
    ],
)
def test_sizes(masked_lm, arch, layers, width, ffn, heads):
    args = Namespace(max_positions=512)
    ARCH_CONFIG_REGISTRY[arch](args)
    assert (args.encoder_layers, args.ea_alpha, args.ea_beta) == (layers, 0.1, 0.5)
    args.encoder_layers = 2
    model = ARCH_MODEL_REGISTRY[arch].build_model(args, masked_lm)
    first, second = model.encoder.sentence_encoder.layers
    assert second.fc1.weight.shape == (ffn, width)
    assert second.self_attn.evolution.weight.shape == (heads, heads, 3, 3)
    assert first.self_attn.evolution is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ea_alpha": 1.5}, "--ea-alpha must lie in .0, 1., got 1.5"),
        ({"ea_beta": -0.1}, "--ea-beta must lie in .0, 1., got -0.1"),
        ({"ea_kernel_size": 4}, "--ea-kernel-size must be odd"),
        ({"ea_learnable": 1}, "--ea-learnable must be True or False, got 1"),
        ({"ea_attentions": "encoder"}, "no such option: ea_attentions; there are ea_alpha"),
        ({"encoder_layers": 1}, "fewer than two layers.*encoder: 1"),
        ({"encoder_attention_heads": 5}, "--encoder-attention-heads must be positive and divide"),
        ({"mha_heads_to_keep": 2}, "--mha-heads-to-keep cannot be used"),
    ],
)
def test_bad_options_are_named(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
