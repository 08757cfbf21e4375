"""ea_transformer: its laws, and its equality with fairseq's transformer."""

import copy
import random

import onnxruntime
import pytest
import torch
from fairseq.models.transformer import TransformerModel
from fairseq.modules import FairseqDropout
from fairseq.sequence_generator import SequenceGenerator

from ea_fairseq.modules import EvolvingMultiheadAttention
from evolving_attention import reference

EVOLVING = {"ea_alpha": 0.3, "ea_beta": 0.4}
VARIANTS = [
    EVOLVING,
    {**EVOLVING, "ea_kernel_size": 5},
    {**EVOLVING, "ea_kernel_size": 1},
    {**EVOLVING, "ea_learnable": True},
    {"ea_alpha": 0.5, "ea_beta": 0.0},
    {"ea_alpha": 0.0, "ea_beta": 0.5},
    {**EVOLVING, "ea_attentions": "decoder"},
    {**EVOLVING, "ea_attentions": "encoder,cross"},
    {**EVOLVING, "encoder_normalize_before": True, "decoder_normalize_before": True},
    {**EVOLVING, "ea_keys": "centred"},
]


def logits_of(model, src, tgt):
    lengths = src.ne(model.encoder.padding_idx).sum(1)
    return model(src, lengths, tgt)[0]


def pad_to(tokens, length, pad, left):
    padding = tokens.new_full((tokens.size(0), length - tokens.size(1)), pad)
    return torch.cat([padding, tokens] if left else [tokens, padding], dim=1)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("options", VARIANTS)
def test_a_sentence_alone_equals_itself_in_a_padded_batch(build, sentences, task, options, left):
    model = build(**options)
    src, tgt = sentences(1, 7), sentences(1, 12, seed=1)
    alone = logits_of(model, src, tgt)[0]
    # (Not every version of fairseq's own attention can pad a target to the left.)
    left_target = left and "ea_attentions" not in options
    batch_src = torch.cat([pad_to(src, 11, task.source_dictionary.pad(), left), sentences(1, 11)])
    batch_tgt = torch.cat(
        [pad_to(tgt, 20, task.target_dictionary.pad(), left_target), sentences(1, 20)]
    )
    out = logits_of(model, batch_src, batch_tgt)[0]
    out = out[-12:] if left_target else out[:12]
    torch.testing.assert_close(out, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", VARIANTS)
def test_no_target_position_sees_the_future(build, sentences, options):
    model = build(**options)
    src, tgt = sentences(2, 9), sentences(2, 14, seed=1)
    before = logits_of(model, src, tgt)
    for changed in (1, 5, 13):
        other = tgt.clone()
        other[:, changed:] = sentences(2, 14 - changed, seed=2)
        after = logits_of(model, src, other)
        assert torch.equal(after[:, :changed], before[:, :changed])
        assert not torch.allclose(after[:, changed:], before[:, changed:])


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("beam", [1, 4])
@torch.no_grad()
def test_incremental_decoding_equals_teacher_forcing(build, sentences, task, options, beam):
    """30 steps with random reordering of beams, a dropped sentence and a padded source."""
    rng = random.Random(0)
    model = build(**options)
    teacher = copy.deepcopy(model)
    model.decoder.set_beam_size(beam)
    src = sentences(3, 9)
    src[1] = pad_to(src[1:2, :5], 9, task.source_dictionary.pad(), left=True)
    order = torch.arange(3).repeat_interleave(beam)
    encoder_out = model.encoder(src, src.ne(task.source_dictionary.pad()).sum(1))
    encoder_out = model.encoder.reorder_encoder_out(encoder_out, order)
    tokens, state = sentences(3 * beam, 1), {}
    for step in range(30):
        last, _ = model.decoder(tokens, encoder_out=encoder_out, incremental_state=state)
        full, _ = teacher.decoder(tokens, encoder_out=encoder_out)
        torch.testing.assert_close(last[:, -1], full[:, -1], rtol=0, atol=1e-5)
        order = [
            first + rng.randrange(beam)
            for first in range(0, len(tokens), beam)
            for _ in range(beam)
        ]
        order = torch.tensor(order[beam:] if step == 15 else order)
        tokens = torch.cat([tokens[order], sentences(len(order), 1, seed=step)], dim=1)
        model.decoder.reorder_incremental_state_scripting(state, order)
        encoder_out = model.encoder.reorder_encoder_out(encoder_out, order)


# (The host's plain self-attention gives NaN for queries that are padding.)
@pytest.mark.parametrize("options", [x for x in VARIANTS if x != VARIANTS[7]])
def test_steps_of_padded_targets(build, sentences, task, options):
    """Left-padded targets without positions, since fairseq's steps count padding as positions."""
    model = build(**options, no_token_positional_embeddings=True)
    encoder_out = model.encoder(sentences(2, 9), torch.full((2,), 9))
    tokens = sentences(2, 8, seed=1)
    tokens[1, :3] = task.target_dictionary.pad()
    full, _ = model.decoder(tokens, encoder_out=encoder_out)
    state = {}
    for end in range(1, 9):
        last, _ = model.decoder(tokens[:, :end], encoder_out=encoder_out, incremental_state=state)
        kept = [0, 1] if end > 3 else [0]
        torch.testing.assert_close(last[kept, -1], full[kept, end - 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", VARIANTS[:4])
@pytest.mark.parametrize("prefix_length", [0, 2])
def test_generator_scores_equal_teacher_forced_scores(
    build, sentences, task, options, prefix_length
):
    model = build(**options)
    dictionary = task.target_dictionary
    src = sentences(4, 8)
    src[0] = pad_to(src[:1, :4], 8, dictionary.pad(), left=True)
    lengths = src.ne(dictionary.pad()).sum(1)
    prefix = sentences(4, prefix_length, seed=3) if prefix_length else None
    generator = SequenceGenerator([model], dictionary, beam_size=5, max_len_b=12)
    sample = {"net_input": {"src_tokens": src, "src_lengths": lengths}}
    finished = generator.generate([model], sample, prefix_tokens=prefix)
    teacher = build(**options)
    for index, hypotheses in enumerate(finished):
        for hypothesis in hypotheses:
            tokens = hypothesis["tokens"].unsqueeze(0)
            if prefix is not None:
                assert torch.equal(tokens[0, :prefix_length], prefix[index])
            shifted = torch.cat([tokens.new_full((1, 1), dictionary.eos()), tokens[:, :-1]], 1)
            logits = teacher(src[index : index + 1], lengths[index : index + 1], shifted)[0]
            scores = logits.log_softmax(-1).gather(2, tokens.unsqueeze(2))[0, :, 0]
            torch.testing.assert_close(hypothesis["positional_scores"], scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "side", [{}, {"encoder_normalize_before": True, "share_all_embeddings": 1}]
)
def test_without_evolution_it_is_fairseqs_transformer(build, sentences, task, side):
    """Bit for bit, in logits, gradients and the names of the weights."""
    plain = build("transformer_tiny", **side)
    assert type(plain) is TransformerModel
    ours = build("ea_transformer_tiny", ea_alpha=0.0, ea_beta=0.0, **side)
    ours.load_state_dict(plain.state_dict())
    src, tgt = sentences(3, 9), sentences(3, 7, seed=1)
    src[1, 6:] = tgt[2, 4:] = task.source_dictionary.pad()
    ours.train(), plain.train()
    expected, got = logits_of(plain, src, tgt), logits_of(ours, src, tgt)
    assert torch.equal(got, expected)
    got.square().mean().backward()
    expected.square().mean().backward()
    for (name, parameter), (other, own) in zip(
        plain.named_parameters(), ours.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(own.grad, parameter.grad), name


def test_our_own_attention_arithmetic_is_fairseqs(build, sentences, task):
    """A learnable model that starts at alpha = beta = 0 runs our attention, not fairseq's."""
    plain = build("transformer_tiny")
    ours = build("ea_transformer_tiny", ea_alpha=0.0, ea_beta=0.0, ea_learnable=True)
    ours.load_state_dict(plain.state_dict())
    src, tgt = sentences(3, 9), sentences(3, 7, seed=1)
    src[1, 6:] = task.source_dictionary.pad()
    for model in (ours, plain):
        model.eval()
    expected, got = logits_of(plain, src, tgt), logits_of(ours, src, tgt)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    lengths = src.ne(task.source_dictionary.pad()).sum(1)
    own_attn, attn = (m(src, lengths, tgt)[1]["attn"][0] for m in (ours, plain))
    torch.testing.assert_close(own_attn, attn, rtol=0, atol=1e-6)


def test_maps_are_those_of_the_equations(build, sentences):
    """The maps that layers hand on, against the reference with the layers' q and k."""
    model = build(**EVOLVING).double()
    seen = {}

    def keep(module, args, kwargs, output):
        query, key = kwargs["query"], kwargs["key"]
        q = module.split_heads(module.q_proj(query)) * module.head_dim**-0.5
        k = module.split_heads(module.k_proj(key))
        seen[module] = (q @ k.transpose(2, 3), kwargs.get("attn_mask"), output[2])

    for module in model.modules():
        if isinstance(module, EvolvingMultiheadAttention):
            module.register_forward_hook(keep, with_kwargs=True)
    logits_of(model, sentences(2, 6), sentences(2, 5, seed=1))
    stacks = [
        ("bidirectional", [layer.self_attn for layer in model.encoder.layers]),
        ("causal", [layer.self_attn for layer in model.decoder.layers]),
        ("cross", [layer.encoder_attn for layer in model.decoder.layers]),
    ]
    for window, stack in stacks:
        first, *later = stack
        prev = seen[first][0]
        torch.testing.assert_close(seen[first][2], prev)
        assert first.evolution is None
        for attention in later:
            logits, mask, handed_on = seen[attention]
            evolution = attention.evolution
            assert evolution.window == window
            weights = (evolution.weight, evolution.bias, *EVOLVING.values())
            expected = reference.evolve(logits, prev, *weights, window, mask)
            torch.testing.assert_close(handed_on, expected, rtol=0, atol=1e-9)
            prev = expected


def gradients(model, src, tgt, pad):
    model.train()
    model.zero_grad()
    logits = model(src, src.ne(pad).sum(1), tgt)[0]
    logits.float().log_softmax(-1)[..., 7].sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("options", [*VARIANTS, {**EVOLVING, "share_all_embeddings": True}])
def test_activation_checkpointing_gives_equal_gradients_to_every_parameter(
    build, sentences, task, options
):
    options = {**options, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    src, tgt = sentences(2, 9), sentences(2, 7, seed=1)
    pad = task.source_dictionary.pad()
    src[1, 6:] = pad
    plain = gradients(build(**options), src, tgt, pad)
    checkpointed = gradients(build(**options, checkpoint_activations=True), src, tgt, pad)
    assert plain.keys() == checkpointed.keys()
    for name, grad in plain.items():
        assert grad is not None, f"{name} gets no gradient"
        torch.testing.assert_close(checkpointed[name], grad, rtol=1e-5, atol=1e-6)
        if "k_proj.bias" not in name:  # softmax ignores what all keys have in common ...
            assert grad.abs().sum() > 0, f"the gradient of {name} is zero"


@pytest.mark.parametrize("learnable", [False, True])
def test_checkpointing_under_autocast(build, sentences, task, learnable):
    """fairseq recomputes a checkpointed layer outside of autocast, in single precision."""
    src, tgt = sentences(2, 9), sentences(2, 7, seed=1)
    results = []
    for checkpoint in (False, True):
        model = build(**EVOLVING, ea_learnable=learnable, checkpoint_activations=checkpoint)
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = logits_of(model, src, tgt).float().log_softmax(-1)[..., 7].mean()
        loss.backward()
        results.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad, rtol=0.1, atol=0.02)


def test_activations_offloaded(build, sentences, task):
    src, tgt = sentences(2, 9), sentences(2, 7, seed=1)
    pad = task.source_dictionary.pad()
    plain = gradients(build(**EVOLVING), src, tgt, pad)
    offloading = build(**EVOLVING, offload_activations=True)
    for layer in (*offloading.encoder.layers, *offloading.decoder.layers):
        assert layer.forward.args[-1] is True  # of fairseq's checkpoint_wrapper: offload_to_cpu
    for name, grad in gradients(offloading, src, tgt, pad).items():
        torch.testing.assert_close(grad, plain[name], rtol=1e-5, atol=1e-6)


def test_dropouts_are_fairseqs(build, sentences):
    """The same places, probabilities and names (--retain-dropout-modules), the same noise."""
    noisy = {"dropout": 0.3, "attention_dropout": 0.2, "activation_dropout": 0.1}
    plain, ours = build("transformer_tiny", **noisy), build(**EVOLVING, **noisy)

    def dropouts(model):
        return {
            name: (module.module_name, module.p)
            for name, module in model.named_modules()
            if isinstance(module, FairseqDropout)
        }

    assert dropouts(ours) == dropouts(plain)
    start = build(**noisy, ea_alpha=0.0, ea_beta=0.0, ea_learnable=True)
    start.load_state_dict(plain.state_dict())
    source = torch.zeros(5, 2, 64)
    for attention in (plain.encoder.layers[1].self_attn, start.encoder.layers[1].self_attn):
        attention.train()
        attention.v_proj.bias.data.fill_(1)
        out = attention(source, source, source)[0]
        assert not torch.allclose(out[0], out[1])  # dropped differently


def test_all_of_the_hosts_layer_options(build, sentences, task):
    """Our loops and layers against fairseq's, with all the parts that its layers can have."""
    every = {
        "layernorm_embedding": True,
        "scale_attn": True,
        "scale_heads": True,
        "scale_fc": True,
        "scale_resids": True,
        "decoder_output_dim": 32,
    }
    plain = build("transformer_tiny", **every)
    ours = build(**every, ea_alpha=0.0, ea_beta=0.0, ea_learnable=True)
    for parameter in plain.parameters():  # weights that start at 1 would not show
        parameter.data += 0.1 * torch.randn_like(parameter)
    ours.load_state_dict(plain.state_dict())
    src, tgt = sentences(3, 9), sentences(3, 7, seed=1)
    lengths = torch.full((3,), 9)
    torch.testing.assert_close(
        logits_of(ours, src, tgt), logits_of(plain, src, tgt), rtol=0, atol=1e-4
    )
    padded = pad_to(src[:1], 12, task.source_dictionary.pad(), left=True)
    counts = [model.encoder(padded, lengths[:1])["src_lengths"][0] for model in (ours, plain)]
    assert torch.equal(*counts)
    for layer in (*ours.encoder.layers, *plain.encoder.layers):
        layer.return_fc = True
    outs = [
        model.encoder(
            src,
            lengths,
            return_all_hiddens=True,
            token_embeddings=2 * model.encoder.embed_tokens(src),
        )
        for model in (ours, plain)
    ]
    assert outs[0].keys() == outs[1].keys()
    assert len(outs[0]["fc_results"]) == 3
    for key in ("encoder_out", "encoder_embedding", "encoder_states", "fc_results", "src_lengths"):
        for own, theirs in zip(outs[0][key], outs[1][key], strict=True):
            torch.testing.assert_close(own, theirs, rtol=0, atol=1e-4)
    for options in (
        {"full_context_alignment": True},
        {"alignment_layer": 1, "alignment_heads": 1},
        {"features_only": True},
    ):
        own, theirs = (
            model.decoder(tgt, encoder_out=out, **options)
            for model, out in zip((ours, plain), outs, strict=True)
        )
        torch.testing.assert_close(own[0], theirs[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(own[1]["attn"][0], theirs[1]["attn"][0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_beams_of_one_encoder_output(build, sentences):
    """Keys that exist once per sentence, not once per beam, are used as they are."""
    model = build(**EVOLVING)
    model.decoder.set_beam_size(2)
    src, tokens = sentences(2, 9), sentences(4, 1, seed=1)
    once = model.encoder(src, torch.full((2,), 9))
    order = torch.arange(2).repeat_interleave(2)
    per_beam = model.encoder.reorder_encoder_out(once, order)
    own, expected = (
        model.decoder(tokens, encoder_out=out, incremental_state={})[0] for out in (once, per_beam)
    )
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-5)


def test_loading_takes_over_all_or_nothing_of_an_evolution(build):
    state = build(**EVOLVING).state_dict()
    key = "encoder.layers.1.self_attn.evolution."
    without_bias = {name: weight for name, weight in state.items() if name != f"{key}bias"}
    with pytest.raises(RuntimeError, match="Missing key.*evolution.bias"):
        build(**EVOLVING).load_state_dict(without_bias)
    encoder = {"ea_alpha": 0.5, "ea_beta": 0.0, "ea_attentions": "encoder"}
    state_of_encoder = build(**encoder).state_dict()
    with pytest.raises(RuntimeError, match="map of decoder.layers.1.self_attn does not evolve"):
        build(**{**encoder, "ea_attentions": "decoder,encoder"}).load_state_dict(state_of_encoder)
    build(seed=1, **encoder).load_state_dict(state_of_encoder)
    misspelt = {
        name.replace("evolution.weight", "evolution.wieght"): w for name, w in state.items()
    }
    with pytest.raises(RuntimeError, match="evolution.wieght"):
        build(**EVOLVING).load_state_dict(misspelt)


def test_learned_numbers_are_not_lost_in_a_model_that_does_not_learn_them(build):
    learned = build(**EVOLVING, ea_learnable=True)
    with torch.no_grad():
        learned.encoder.layers[1].self_attn.evolution.alpha.fill_(0.875)
    with pytest.raises(RuntimeError, match="alpha is 0.875 in the checkpoint"):
        build(**EVOLVING).load_state_dict(learned.state_dict())


def test_dropout_is_the_same_when_checkpointed(build, sentences, task):
    src, tgt = sentences(2, 9), sentences(2, 7, seed=1)
    noisy = {**EVOLVING, "dropout": 0.2, "attention_dropout": 0.2}
    results = []
    for checkpoint in (False, True):
        model = build(**noisy, checkpoint_activations=checkpoint)
        torch.manual_seed(5)
        results.append(gradients(model, src, tgt, task.source_dictionary.pad()))
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad, rtol=1e-5, atol=1e-6)


def test_layer_drop(build, sentences, task):
    """Any layer may be dropped, even the first; the last map flows on. In eval mode, all run."""
    src, tgt = sentences(2, 9), sentences(2, 7, seed=1)
    pad = task.source_dictionary.pad()
    model = build(**EVOLVING, encoder_layerdrop=0.5, decoder_layerdrop=0.5)
    whole = build(**EVOLVING)
    whole.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(model, src, tgt), logits_of(whole, src, tgt))
    got_gradients = 0
    for seed in range(20):
        torch.manual_seed(seed)
        grads = gradients(model, src, tgt, pad)
        assert all(g is None or g.isfinite().all() for g in grads.values())
        got_gradients += grads["encoder.layers.2.self_attn.evolution.weight"] is not None
    assert 0 < got_gradients < 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(build, sentences, dtype):
    model = build(**EVOLVING)
    src, tgt = sentences(2, 9), sentences(2, 7, seed=1)
    exact = logits_of(model, src, tgt)
    with torch.autocast("cpu", dtype):
        mixed = logits_of(model, src, tgt)
    half = logits_of(model.to(dtype), src, tgt)
    for out in (mixed, half):
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), exact, rtol=0, atol=0.15)


@pytest.mark.parametrize("options", VARIANTS)
def test_torchscript(build, reload, sentences, task, options):
    model = build(**options)
    src, tgt = sentences(2, 9), sentences(2, 7, seed=1)
    src[1, 6:] = tgt[1, 4:] = task.source_dictionary.pad()
    lengths = src.ne(task.source_dictionary.pad()).sum(1)
    scripted = reload(torch.jit.script(model))
    expected, got = model(src, lengths, tgt)[0], scripted(src, lengths, tgt)[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # the exporter's
def test_onnx(build, sentences, task, tmp_path):
    """Traced with a padded sentence, as docs/fairseq.md says, the file is right for all batches."""
    model, pad = build(**EVOLVING), task.source_dictionary.pad()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, src, tgt):
            return self.model(src, None, tgt)[0]

    def example(batch, src_len, tgt_len):
        src, tgt = sentences(batch, src_len), sentences(batch, tgt_len, seed=1)
        src[-1, 3:], tgt[-1, 3:] = pad, pad
        return src, tgt

    axes = {"src": {0: "batch", 1: "length"}, "tgt": {0: "batch", 1: "tgt_length"}}
    arguments = {"input_names": ["src", "tgt"], "dynamic_axes": axes, "dynamo": False}
    torch.onnx.export(Model().eval(), example(2, 9, 7), tmp_path / "model.onnx", **arguments)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for src, tgt in (example(2, 9, 7), example(3, 12, 8), (sentences(1, 5), sentences(1, 4))):
        (got,) = session.run(None, {"src": src.numpy(), "tgt": tgt.numpy()})
        expected = model(src, None, tgt)[0].detach()
        real = tgt.ne(pad)
        torch.testing.assert_close(torch.tensor(got)[real], expected[real], rtol=0, atol=1e-3)


def test_dynamic_quantisation(build, sentences):
    model = build(**EVOLVING)
    src, tgt = sentences(2, 9), sentences(2, 7, seed=1)
    lengths = torch.tensor([9, 9])
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    expected, got = model(src, lengths, tgt)[0], quantised(src, lengths, tgt)[0]
    assert 0 < (got - expected).abs().max() < 0.2 * expected.abs().max()


def test_scripted_generator(build, reload, sentences, task):
    model = build(**EVOLVING)
    src = sentences(3, 8)
    sample = {"net_input": {"src_tokens": src, "src_lengths": torch.full((3,), 8)}}
    plain = SequenceGenerator([model], task.target_dictionary, beam_size=3, max_len_b=10)
    expected = plain.forward(sample)
    got = reload(torch.jit.script(plain)).forward(sample)
    for ours, theirs in zip(got, expected, strict=True):
        assert [h["tokens"].tolist() for h in ours] == [h["tokens"].tolist() for h in theirs]


@pytest.mark.parametrize("extra", [{"decoder_embed_dim": 32}, {"no_cross_attention": True}])
def test_other_shapes_of_the_host(build, sentences, extra):
    model = build(**EVOLVING, **extra)
    assert logits_of(model, sentences(2, 9), sentences(2, 7, seed=1)).isfinite().all()


def test_parameter_counts(build):
    """Transformer-Base and -Lite of the paper, without embeddings and output layer."""

    def count(model):
        names = ("embed", "output_projection")
        return sum(
            parameter.numel()
            for name, parameter in model.named_parameters()
            if not any(part in name for part in names)
        )

    for arch, plain, evolving in (
        ("ea_transformer", 44_138_496, 15 * (8 * 8 * 9 + 8)),
        ("ea_transformer_lite", 2_482_560, 15 * (4 * 4 * 9 + 4)),
    ):
        sizes = {"encoder_layers": 6, "decoder_layers": 6}
        assert count(build(arch, **sizes)) == plain + evolving
        assert count(build(arch, **sizes, ea_alpha=0.0, ea_beta=0.0)) == plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ea_alpha": 1.5}, r"--ea-alpha must lie in \[0, 1\], got 1.5"),
        ({"ea_beta": -0.5}, r"--ea-beta must lie in \[0, 1\], got -0.5"),
        ({"ea_kernel_size": 4}, "--ea-kernel-size must be odd and positive .*, got 4"),
        ({"ea_attentions": "encoder,self"}, "--ea-attentions must be .*, got 'encoder,self'"),
        ({"ea_attentions": ""}, "--ea-attentions must be"),
        ({"ea_keys": "later"}, "--ea-keys must be one of earlier, centred, got 'later'"),
        ({"ea_attentions": ["encoder"]}, r"--ea-attentions must be .*, got \['encoder'\]"),
        ({"ea_alpha": "abc"}, r"--ea-alpha must lie in \[0, 1\], got 'abc'"),
        ({"ea_kernel_size": "3"}, "--ea-kernel-size must be odd and positive .*, got '3'"),
        ({"ea_learnable": "yes"}, "--ea-learnable must be True or False, got 'yes'"),
        ({"encoder_attention_heads": 0}, "--encoder-attention-heads must be .*, got 0"),
        ({"decoder_attention_heads": -2}, "--decoder-attention-heads must be .*, got -2"),
        ({"decoder_attention_heads": 5}, r"divide --decoder-embed-dim \(64\), got 5"),
        ({"base_layers": 1}, "--base-layers must be 0"),
        ({"ea_betta": 0.3}, "no such option: ea_betta; there are ea_alpha, ea_beta"),
        ({"cross_self_attention": True}, "--cross-self-attention cannot be used"),
        ({"encoder_xformers_att_config": "{}"}, "--encoder-xformers-att-config cannot be used"),
    ],
)
def test_bad_options(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_what_cannot_work_says_so(build, sentences):
    model = build(**EVOLVING)
    attention = model.encoder.layers[0].self_attn
    with pytest.raises(
        NotImplementedError, match="heads of an evolving attention cannot be pruned"
    ):
        attention._adaptive_prune_heads([(0, 32)])
    x = torch.zeros(5, 2, 64)
    with pytest.raises(ValueError, match="attn_mask must be of dtype torch.bool"):
        attention(x, x, x, attn_mask=torch.zeros(5, 5))
    with pytest.raises(ValueError, match="prev_attn_logits has shape"):
        model.encoder.layers[1](x, None, prev_attn_logits=torch.zeros(2, 2, 5, 4))
