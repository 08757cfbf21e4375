"""ea_transformers: values, gradients and maps of the models, and their laws."""

import importlib
import sys

import pytest
import torch
from torch import nn
from transformers_models import (
    ALL_HEADS,
    EVOLVING,
    OFF,
    PAD,
    VARIANTS,
    ea_transformers,
    evolving,
    first_output,
    inputs_for,
    plain,
    tokens,
    transformers,
)

from evolving_attention import collect_maps, reference


@pytest.mark.parametrize(("host", "head"), ALL_HEADS)
def test_without_evolution_it_is_the_plain_model(host, head):
    """Bit for bit the eager one, values and gradients, and almost the one with sdpa."""
    models = plain(host, head), evolving(host, head, **OFF)
    inputs = inputs_for(host, head)
    outputs = [model(**inputs, output_hidden_states=True) for model in models]
    expected, got = (first_output(x) for x in outputs)
    assert torch.equal(got, expected)
    for out in (expected, got):
        out.square().mean().backward()
    assert type(models[1]).__name__ == f"EA{type(models[0]).__name__}"
    weights = zip(models[0].named_parameters(), models[1].named_parameters(), strict=True)
    for (name, parameter), (other, own) in weights:
        assert name == other
        assert own.grad is parameter.grad is None or own.grad.equal(parameter.grad), name
    fused = plain(host, head, attn_implementation="sdpa")
    real = inputs["attention_mask"].bool()
    fused_output = first_output(fused(**inputs))
    if fused_output.shape[:2] == real.shape:
        fused_output, got = fused_output[real], got[real]
    torch.testing.assert_close(got, fused_output, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("host", ["bert", "roberta"])
def test_encoders_compute_the_equations(host, options):
    """Values and gradients of the literal equations, in float64."""
    model = evolving(host, "Model", **options).double()
    inputs = inputs_for(host, "Model")
    real = inputs["attention_mask"].bool()
    hidden = ~real[:, None, None, :]
    absent = hidden | ~real[:, None, :, None]

    got = model(**inputs).last_hidden_state[real]
    x = model.embeddings(inputs["input_ids"])
    prev = None
    for layer in model.encoder.layer:
        attention = layer.attention.self
        q, k, v = (
            f(x).unflatten(2, (4, 8)).transpose(1, 2)
            for f in (attention.query, attention.key, attention.value)
        )
        logits = q @ k.transpose(2, 3) / 8**0.5
        if prev is not None:
            logits = evolve(attention, logits, prev, "bidirectional", absent, options)
        prev = logits
        out = reference.attend(logits, v, hidden).transpose(1, 2).flatten(2)
        x = layer.feed_forward_chunk(layer.attention.output(out, x))
    compare(model, got, x[real])


def evolve(attention, logits, prev, window, absent, options):
    evolution = attention.evolution
    weight, bias = evolution.weight, evolution.bias
    if weight is None:
        weight, bias = logits.new_zeros(4, 4, 1, 1), logits.new_zeros(4)
    alpha, beta = options.get("ea_alpha"), options.get("ea_beta")
    if options.get("ea_learnable"):
        alpha, beta = evolution.alpha, evolution.beta
    return reference.evolve(logits, prev, weight, bias, alpha, beta, window, absent)


def compare(model, got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    weights = [p for p in model.parameters() if p.requires_grad]
    gradients = [
        torch.autograd.grad(out.square().sum(), weights, allow_unused=True)
        for out in (got, expected)
    ]
    for ours, literal in zip(*gradients, strict=True):
        assert (ours is None) == (literal is None)
        if ours is not None:
            torch.testing.assert_close(ours, literal, rtol=1e-7, atol=1e-9)


def future(length):
    return torch.ones(length, length, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("options", VARIANTS)
def test_t5_computes_the_equations(options):
    """Encoder, decoder and cross-attention, with padding on both sides, in float64."""
    model = evolving("t5", "Model", **options).double()
    inputs = inputs_for("t5", "Model")
    decoder_mask = torch.ones(2, 6, dtype=torch.long)
    decoder_mask[0, :2] = 0
    real, target = inputs["attention_mask"].bool(), decoder_mask.bool()
    got = model(**inputs, decoder_attention_mask=decoder_mask).last_hidden_state[target]

    hidden = ~real[:, None, None, :]
    absent = hidden | ~real[:, None, :, None]
    x = stack(
        model.encoder, inputs["input_ids"], [("bidirectional", hidden, absent)], None, options
    )
    padded = ~target[:, None, :, None]
    own = (future(6) | ~target[:, None, None, :]) & ~padded  # nothing reads a padded query's output
    masks = [("causal", own, own | future(6) | padded), ("cross", hidden, hidden | padded)]
    y = stack(model.decoder, inputs["decoder_input_ids"], masks, x, options)
    compare(model, got, y[target])


def stack(stack, input_ids, masks, source, options):
    x = stack.embed_tokens(input_ids)
    maps = [None, None]
    first = stack.block[0].layer[0].SelfAttention
    for block in stack.block:
        for i, (window, hidden, absent) in enumerate(masks):
            layer = block.layer[i]
            attention = layer.SelfAttention if i == 0 else layer.EncDecAttention
            normed = layer.layer_norm(x)
            memory = normed if i == 0 else source
            q, k, v = (
                f(y).unflatten(2, (4, 8)).transpose(1, 2)
                for f, y in ((attention.q, normed), (attention.k, memory), (attention.v, memory))
            )
            logits = q @ k.transpose(2, 3)
            if i == 0:
                logits = logits + first.compute_bias(x.size(1), x.size(1))
            if maps[i] is not None:
                logits = evolve(attention, logits, maps[i], window, absent, options)
            maps[i] = logits
            out = reference.attend(logits, v, hidden)
            x = x + attention.o(out.transpose(1, 2).flatten(2))
        x = block.layer[-1](x)
    return stack.final_layer_norm(x)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("host", ["bert", "roberta", "t5"])
def test_padding_changes_nothing(host, options, left):
    head = "EncoderModel" if host == "t5" else "Model"
    model = evolving(host, head, **options)
    sentence = tokens(1, 7)
    positions = {}
    if host == "bert" and left:  # transformers counts positions from the left end
        positions = {"position_ids": torch.cat([torch.zeros(5), torch.arange(7)]).long()[None]}
    alone = model(sentence).last_hidden_state
    padding = torch.full((1, 5), PAD)
    batch = torch.cat([padding, sentence] if left else [sentence, padding], dim=1)
    batch = torch.cat([batch, tokens(1, 12, seed=1)])
    mask = torch.ones_like(batch)
    mask[0, :5] = 0
    mask[0] = mask[0] if left else mask[0].flip(0)
    if host == "roberta":  # likewise, but from token ids other than its padding
        assert model.config.pad_token_id == PAD
    padded = model(batch, attention_mask=mask, **positions).last_hidden_state
    torch.testing.assert_close(padded[0][mask[0].bool()], alone[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("options", VARIANTS)
def test_padding_of_source_and_target_changes_nothing(options, left):
    model = evolving("t5", "ForConditionalGeneration", **options)
    source, target = tokens(1, 6), tokens(1, 5, seed=1)
    alone = model(source, decoder_input_ids=target).logits

    def pad(x, length):
        padding = torch.full((1, length - x.size(1)), PAD)
        mask = torch.tensor([0] * padding.size(1) + [1] * x.size(1))
        x = torch.cat([padding, x] if left else [x, padding], dim=1)
        mask = mask if left else mask.flip(0)
        rest = tokens(1, length, seed=2)
        return torch.cat([rest, x]), torch.stack([torch.ones_like(mask), mask])

    source, source_mask = pad(source, 11)
    target, target_mask = pad(target, 9)
    padded = model(
        source,
        attention_mask=source_mask,
        decoder_input_ids=target,
        decoder_attention_mask=target_mask,
    ).logits
    torch.testing.assert_close(padded[1][target_mask[1].bool()], alone[0], rtol=0, atol=2e-5)


def test_masks_of_four_dimensions():
    """Bool and numbers, for a padded batch, give what the mask of two dimensions gives."""
    for host in ("bert", "roberta"):
        model = evolving(host, "Model")
        inputs = inputs_for(host, "Model", left=True)
        mask = inputs["attention_mask"].bool()
        expected = model(**inputs).last_hidden_state[mask]
        for four in (
            mask[:, None, None, :],
            mask[:, None, None, :].expand(-1, -1, 9, -1),
            torch.zeros(2, 1, 9, 9).masked_fill(~mask[:, None, None, :], -1e9),
        ):
            got = model(inputs["input_ids"], attention_mask=four).last_hidden_state[mask]
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    model = evolving("t5", "Model")
    inputs = inputs_for("t5", "Model")
    target = torch.ones(2, 6, dtype=torch.bool)
    target[0, :2] = False
    expected = model(**inputs, decoder_attention_mask=target.long()).last_hidden_state[target]
    four = target[:, None, None, :] & ~future(6)
    got = model(**inputs, decoder_attention_mask=four).last_hidden_state[target]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    one, every = (  # one row for all queries, which then see the future
        model(**inputs, decoder_attention_mask=target[:, None, None, :].expand(-1, -1, rows, -1))
        for rows in (1, 6)
    )
    assert torch.equal(one.last_hidden_state, every.last_hidden_state)


@pytest.mark.parametrize("options", VARIANTS)
def test_no_position_of_the_decoder_sees_the_future(options):
    model = evolving("t5", "ForConditionalGeneration", **options)
    source, target = tokens(2, 7), tokens(2, 8, seed=1)
    changed = target.clone()
    changed[:, 5:] = tokens(2, 3, seed=2)
    before, after = (model(source, decoder_input_ids=x).logits for x in (target, changed))
    torch.testing.assert_close(after[:, :5], before[:, :5], rtol=0, atol=1e-6)
    assert not after[:, 5:].allclose(before[:, 5:])


@pytest.mark.parametrize("kinds", [["encoder"], ["decoder"], ["cross"], ["encoder", "cross"]])
def test_only_the_named_attentions_of_t5_evolve(kinds):
    model = evolving("t5", "Model", ea_attentions=kinds)
    evolving_names = {
        name.split(".block.")[0] + name.rpartition(".layer.")[2][:2]
        for name, module in model.named_modules()
        if getattr(module, "evolution", None) is not None
    }
    names = {"encoder": "encoder0.", "decoder": "decoder0.", "cross": "decoder1."}
    assert evolving_names == {names[kind] for kind in kinds}
    inputs = inputs_for("t5", "Model")
    assert not torch.equal(model(**inputs)[0], evolving("t5", "Model", **OFF)(**inputs)[0])


@pytest.mark.parametrize("host", ["bert", "roberta", "t5"])
def test_maps_can_be_collected(host):
    """One for each attention, in order, and they are those behind the probabilities."""
    model = evolving(host, "Model")
    inputs = inputs_for(host, "Model")
    with torch.no_grad(), collect_maps(model) as maps:
        outputs = model(**inputs, output_attentions=True)
    if host == "t5":
        probabilities = list(outputs.encoder_attentions)
        for own, cross in zip(outputs.decoder_attentions, outputs.cross_attentions, strict=True):
            probabilities += [own, cross]
        assert maps[4].name == "decoder.block.0.layer.1.EncDecAttention"
    else:
        probabilities = list(outputs.attentions)
        assert maps[1].name == "encoder.layer.1.attention.self"
    for found, expected in zip(maps, probabilities, strict=True):
        assert torch.equal(found.attn_probs, expected)
        shape = found.attn_logits.shape
        assert shape == expected.shape
        real = inputs["attention_mask"][0].bool()
        if shape[-1] == real.numel():  # the first sentence has no padding
            torch.testing.assert_close(found.attn_logits[0].softmax(-1), expected[0])


@pytest.mark.parametrize(("host", "head"), [("bert", "Model"), ("t5", "ForConditionalGeneration")])
def test_outputs_have_the_forms_of_the_plain_model(host, head):
    inputs = inputs_for(host, head)
    for options in (
        {"output_attentions": True},
        {"output_hidden_states": True},
        {"return_dict": False},
        {"output_attentions": True, "output_hidden_states": True, "return_dict": False},
    ):
        expected, got = (model(**inputs, **options) for model in pair(host, head))
        assert type(got) is type(expected)
        assert shapes(got) == shapes(expected)


def pair(host, head):
    return plain(host, head), evolving(host, head)


def shapes(x):
    if isinstance(x, torch.Tensor):
        return x.shape
    if isinstance(x, dict):
        return {name: shapes(value) for name, value in x.items()}
    return [shapes(y) for y in x] if isinstance(x, (tuple, list)) else type(x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("host", "head"),
    [("bert", "ForMaskedLM"), ("roberta", "ForMaskedLM"), ("t5", "ForConditionalGeneration")],
)
def test_checkpointing_gives_the_same_gradients(host, head, reentrant):
    inputs = inputs_for(host, head)
    labels = inputs.get("decoder_input_ids", inputs["input_ids"])
    model = evolving(host, head, ea_learnable=True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    without, with_checkpoints = gradients
    assert without.keys() == with_checkpoints.keys()
    assert any("evolution.alpha" in name for name in without)
    for name, gradient in without.items():
        torch.testing.assert_close(with_checkpoints[name], gradient, msg=name)


def test_feed_forward_in_chunks():
    whole, chunked = evolving("bert", "Model"), evolving("bert", "Model", chunk_size_feed_forward=3)
    inputs = inputs_for("bert", "Model")
    torch.testing.assert_close(chunked(**inputs)[0], whole(**inputs)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("host", ["bert", "t5"])
def test_half_precision(host, dtype):
    """About as far from float32 as the plain model is."""
    head = "Model"
    inputs = inputs_for(host, head)
    errors = []
    for model in pair(host, head):
        exact = model(**inputs).last_hidden_state
        rounded = model.to(dtype)(**inputs).last_hidden_state
        assert rounded.dtype == dtype
        errors.append((rounded.float() - exact).abs().max())
    assert errors[1] < 3 * errors[0]


@pytest.mark.parametrize("host", ["bert", "t5"])
def test_autocast_trains(host):
    head = "ForSequenceClassification"
    model = evolving(host, head).train()
    inputs = inputs_for(host, head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs, labels=torch.tensor([0, 1])).loss
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_misuse_is_an_error():
    bert, t5 = ea_transformers.EABertConfig, ea_transformers.EAT5Config
    for options, message in (
        ({"ea_alpha": 1.5}, r"ea_alpha must lie in \[0, 1\], got 1.5"),
        ({"ea_beta": "0.1"}, r"ea_beta must lie in \[0, 1\], got '0.1'"),
        ({"ea_kernel_size": 4}, "ea_kernel_size must be odd and positive"),
        ({"ea_learnable": "yes"}, "ea_learnable must be True or False"),
        ({"is_decoder": True}, "is_decoder must be False.*ea_t5 has a decoder"),
        ({"ea_alpa": 0.7}, "no such option: ea_alpa; there are ea_alpha, ea_beta, ea_kernel_size"),
        ({"ea_attentions": ["encoder"]}, "no such option: ea_attentions"),
    ):
        with pytest.raises(ValueError, match=message):
            bert(**options)
    for named in ("encoder", ["encoder", "self"], 3, []):
        with pytest.raises(ValueError, match="ea_attentions must be a list of one or more of"):
            t5(ea_attentions=named)
    config = bert(**EVOLVING)
    config.ea_alpha = -1
    with pytest.raises(ValueError, match="ea_alpha"):
        ea_transformers.EABertModel(config)

    with pytest.raises(TypeError, match="must be an EABertConfig, got a BertConfig: make it with"):
        ea_transformers.EABertForMaskedLM(transformers.BertConfig())

    for name in ("flash_attention_2", "flex_attention", "paged|eager"):
        config = bert()
        config._attn_implementation = name
        with pytest.raises(ValueError, match="attn_implementation must be .*no fused kernel"):
            ea_transformers.EABertModel(config)
    model = evolving("bert", "Model")
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
    with pytest.raises(ValueError, match="attn_implementation"):
        model.set_attn_implementation("flash_attention_2")
    assert model.config.output_attentions is False
    classes = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) <= classes
    model.config.output_attentions = True
    assert len(model(tokens(1, 5)).attentions) == 3
    other = plain("bert", "Model")
    other.set_attn_implementation("evolving")
    with pytest.raises(ValueError, match="is for the ea_\\* models, not for BertSelfAttention"):
        other(tokens(1, 5))
    model.encoder.layer = model.encoder.layer[1:]
    with pytest.raises(ValueError, match="evolves the map of the previous layer"):
        model(tokens(1, 5))


def test_an_old_transformers_is_an_error(monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"needs transformers >= 5.24, found 4.57.1: pip install"):
        importlib.reload(ea_transformers)


def test_encoders_take_no_cache():
    model = evolving("bert", "Model")
    with pytest.raises(ValueError, match="cache must be None.*Prefix tuning"):
        model(tokens(1, 5), cache=transformers.DynamicCache())
    with pytest.raises(ValueError, match="encoder_hidden_states must be None"):
        model(tokens(1, 5), encoder_hidden_states=torch.zeros(1, 5, 32))


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_a_model_around_ours_sets_the_attention(name):
    """With our configuration as its own, and with ours as one of several."""

    class Around(transformers.BertPreTrainedModel):
        config_class = ea_transformers.EABertConfig

        def __init__(self, config):
            super().__init__(config)
            self.bert = ea_transformers.EABertModel(config)
            self.post_init()

    around = Around(evolving("bert", "Model").config).eval()
    pair = transformers.EncoderDecoderModel(
        encoder=evolving("bert", "Model"),
        decoder=plain("bert", "LMHeadModel", is_decoder=True, add_cross_attention=True),
    )
    for model, ours in ((around, around.bert), (pair, pair.encoder)):
        expected = ours(tokens(2, 9))[0]
        model.set_attn_implementation(name)
        assert torch.equal(ours(tokens(2, 9))[0], expected)
        ours.config._attn_implementation = name
        assert torch.equal(ours(tokens(2, 9))[0], expected)
    assert pair.decoder.config._attn_implementation == name
    with pytest.raises(ValueError, match="attn_implementation must be left out.*got 'flex_attent"):
        pair.encoder.get_correct_attn_implementation("flex_attention")


def test_a_forgotten_target_is_named_as_by_the_plain_model():
    source = tokens(2, 5)
    for model in (evolving("t5", "Model"), plain("t5", "Model")):
        with pytest.raises(ValueError, match="exactly one of .*input_ids"):
            model(source, decoder_attention_mask=torch.ones(2, 4, dtype=torch.long))
