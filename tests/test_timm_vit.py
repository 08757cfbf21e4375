"""ea_vit_*, ea_deit_*: plain models without evolution, the equations with it, timm's interface."""

import copy

import pytest
import timm
import torch
from timm.models._manipulate import group_parameters
from timm.utils import AttentionExtract
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

import ea_timm
from ea_timm.layers import EvolvingAttention
from evolving_attention import collect_maps, reference

SMALL = {"img_size": 64, "depth": 3, "num_classes": 7}
MODELS = timm.list_models(["ea_vit_*", "ea_deit_*"])


def images(batch=2, height=64, width=64, channels=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, height, width, generator=generator, dtype=dtype)


def create(name="ea_vit_tiny", seed=0, **options):
    torch.manual_seed(seed)
    return timm.create_model(name, **{**SMALL, **options}).eval()


def pair(name, plain_name=None, **options):
    """A plain model and the ea model without evolution, with the same weights, in float64."""
    plain = create(plain_name or plain_version(name), **options).double()
    model = create(name, alpha=0.0, beta=0.0, **options).double()
    model.load_state_dict(plain.state_dict())
    return plain, model


def plain_version(name):
    name = name.removeprefix("ea_")
    return name if "patch16" in name else f"{name}_patch16_224"


def grads(model, x, **options):
    model.zero_grad()
    out = model.forward_features(x, **options)
    (out.square().mean() + model.forward_head(out).square().mean()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_what_is_registered():
    short = ["vit_tiny", "vit_small", "vit_base", "vit_large"]
    short += [
        f"deit_{size}{kind}" for size in ("tiny", "small", "base") for kind in ("", "_distilled")
    ]
    expected = {f"ea_{name}" for name in short} | {f"ea_{name}_patch16_224" for name in short}
    assert set(MODELS) == expected | {"ea_vit_base_patch16_384"}
    for name in MODELS:
        cfg, plain = timm.get_pretrained_cfg(name), timm.get_pretrained_cfg(plain_version(name))
        for field in (
            "input_size",
            "classifier",
            "first_conv",
            "fixed_input_size",
            "interpolation",
        ):
            assert getattr(cfg, field) == getattr(plain, field)
        if "deit" in name:
            assert (cfg.mean, cfg.std, cfg.crop_pct) == (plain.mean, plain.std, plain.crop_pct)


@pytest.mark.parametrize("name", [name for name in MODELS if "patch16" in name])
@pytest.mark.slow
def test_without_evolution_it_is_the_plain_model(name):
    plain, model = pair(name)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    x = images(dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-12)
    expected, got = grads(plain, x), grads(model, x)
    assert got.keys() == expected.keys()
    for parameter, grad in expected.items():
        torch.testing.assert_close(got[parameter], grad, rtol=1e-9, atol=1e-12)
    for options in ({"norm": True}, {"output_fmt": "NLC"}, {"return_prefix_tokens": True}):
        ours = model.forward_intermediates(x, indices=[0, 2], **options)
        theirs = plain.forward_intermediates(x, indices=[0, 2], **options)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    options = {"output_dict": True, "return_prefix_tokens": True}
    ours, theirs = (m.forward_intermediates(x, **options) for m in (model, plain))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": True, "init_values": 1e-2},
        {"reg_tokens": 4, "no_embed_class": True},
        {"class_token": False, "global_pool": "avg"},
        {"global_pool": "map"},
        {"pre_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
        {"in_chans": 1},
        {"attn_layer": "attn"},
    ],
)
def test_without_evolution_options_mean_what_they_mean_in_timm(options):
    plain, model = pair("ea_vit_tiny", **options)
    x = images(channels=options.get("in_chans", 3), dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-12)


def test_without_evolution_masks_mean_what_they_mean_in_timm():
    plain, model = pair("ea_vit_tiny")
    for block in plain.blocks:
        block.attn.fused_attn = False
    x = images(dtype=torch.float64)
    bias = torch.randn(17, 17, dtype=torch.float64)
    allowed = torch.rand(2, 1, 17, 17) > 0.3
    allowed[..., 0] = True
    hidden = torch.ones(2, 1, 1, 17, dtype=torch.bool)
    hidden[..., 0] = hidden[1, ..., 9:] = False
    masks = ({"attn_mask": bias}, {"attn_mask": allowed}, {"attn_mask": hidden})
    for options in (*masks, {"is_causal": True}):
        expected = plain.forward_features(x, **options)
        torch.testing.assert_close(model.forward_features(x, **options), expected)


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_maps_follow_the_equations(kernel_size, learnable):
    """The maps of all blocks, against the literal equations on queries and keys of the model."""
    alpha, beta = 0.25, 0.375
    model = create(alpha=alpha, beta=beta, kernel_size=kernel_size, learnable=learnable).double()
    x = images(dtype=torch.float64)
    qkv = {}
    for index, block in enumerate(model.blocks):
        block.attn.qkv.register_forward_hook(lambda _, __, out, i=index: qkv.update({i: out}))
    probs = list(AttentionExtract(model, method="hook")(x).values())
    assert len(probs) == 3
    prev = None
    for index, block in enumerate(model.blocks):
        q, k, _ = qkv[index].reshape(2, 17, 3, 3, 64).permute(2, 0, 3, 1, 4)
        attn_logits = q @ k.transpose(2, 3) / 8
        if prev is not None:
            evolution = block.attn.evolution
            attn_logits = reference.evolve(
                attn_logits, prev, evolution.weight, evolution.bias, alpha, beta
            )
        torch.testing.assert_close(probs[index], attn_logits.softmax(-1), rtol=0, atol=1e-12)
        prev = attn_logits


def test_the_first_block_is_plain():
    assert create().blocks[0].attn.evolution is None
    names = [name for name, _ in create(learnable=True).named_parameters() if "evolution" in name]
    expected = [
        f"blocks.{block}.attn.evolution.{name}"
        for block in (1, 2)
        for name in ("alpha", "beta", "weight", "bias")
    ]
    assert sorted(names) == sorted(expected)


@pytest.mark.parametrize("method", ["fx", "hook"])
def test_timm_extracts_the_maps_of_every_layer(method):
    model = create()
    maps = AttentionExtract(model, method=method)(images())
    assert len(maps) == 3
    for probs in maps.values():
        assert probs.shape == (2, 3, 17, 17)
        torch.testing.assert_close(probs.sum(-1), torch.ones(2, 3, 17))


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("name", ["ea_vit_tiny", "ea_deit_tiny_distilled"])
def test_checkpointing_changes_no_gradient(name, learnable):
    model = create(name, learnable=learnable).double().train()
    x = images(dtype=torch.float64)
    expected = grads(model, x)
    model.set_grad_checkpointing()
    got = grads(model, x)
    for parameter, grad in expected.items():
        assert grad.abs().sum() > 0, parameter
        torch.testing.assert_close(got[parameter], grad, rtol=0, atol=0)
    features = model.forward_intermediates(x, indices=[2], intermediates_only=True)[0]
    assert features.is_contiguous()
    model.set_grad_checkpointing(False)
    plain = model.forward_intermediates(x, indices=[2], intermediates_only=True)[0]
    torch.testing.assert_close(features, plain, rtol=0, atol=0)


def test_checkpointing_under_autocast_changes_no_gradient():
    model = create().train()
    with torch.autocast("cpu", torch.bfloat16):
        expected = grads(model, images())
    model.set_grad_checkpointing()
    with torch.autocast("cpu", torch.bfloat16):
        got = grads(model, images())
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_mask_of_ones_is_none():
    model = create()
    ones = torch.ones(17, 17, dtype=torch.bool)
    x = images()
    torch.testing.assert_close(model.forward_features(x, attn_mask=ones), model.forward_features(x))


@pytest.mark.parametrize("additive", [False, True])
def test_tokens_that_no_query_sees_have_no_influence(additive):
    """With the last tokens as padding, the others get the same result as without them."""
    model = create(alpha=0.3, beta=0.4).double()
    tokens = torch.randn(2, 17, 192, dtype=torch.float64)
    allowed = torch.ones(2, 1, 1, 17, dtype=torch.bool)
    allowed[..., 12:] = False
    mask = allowed
    if additive:
        mask = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -1e9)

    def run(x, mask):
        attn_logits = None
        for block in model.blocks:
            x, attn_logits = block(x, attn_logits, mask)
        return x[:, :12]

    torch.testing.assert_close(run(tokens, mask), run(tokens[:, :12], None), rtol=0, atol=1e-12)


def test_queries_that_see_nothing_get_zeros_as_in_timm():
    """Padding of queries and keys: no NaN, not even in gradients, and timm's numbers."""
    plain, model = pair("ea_vit_tiny")
    real = torch.ones(2, 17, dtype=torch.bool)
    real[1, 12:] = False
    mask = real[:, None, :, None] & real[:, None, None, :]
    x = images(dtype=torch.float64)
    expected = plain.forward_features(x, attn_mask=mask)
    torch.testing.assert_close(model.forward_features(x, attn_mask=mask), expected)
    evolving = create(alpha=0.3, beta=0.4).double()
    out = evolving.forward_features(x, attn_mask=mask)
    keys_alone = evolving.forward_features(x, attn_mask=real[:, None, None, :])
    torch.testing.assert_close(out[real], keys_alone[real], rtol=0, atol=1e-12)
    assert all(g.isfinite().all() for g in grads(evolving, x, attn_mask=mask).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_the_lowest_number_hides_in_half_precision_too(dtype, autocast):
    """As in the masks of timm's ``create_attention_mask``, which hide the rows of padding."""
    model = create(alpha=0.3, beta=0.4)
    model = model if autocast else model.to(dtype)
    x = images() if autocast else images().to(dtype)
    real = torch.ones(2, 17, dtype=torch.bool)
    real[1, 12:] = False
    allowed = real[:, None, :, None] & real[:, None, None, :]
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.autocast("cpu", dtype, enabled=autocast):
        expected = model.forward_features(x, attn_mask=allowed)
        got = model.forward_features(x, attn_mask=mask)
    assert expected.isfinite().all()
    torch.testing.assert_close(got, expected)


def test_causal_attention_sees_no_later_token():
    model = create(alpha=0.3, beta=0.4).double()
    x = images(dtype=torch.float64)
    changed = x.clone()
    changed[:, :, 48:, 48:] += 1  # the last patch
    before, after = (model.forward_features(y, is_causal=True) for y in (x, changed))
    torch.testing.assert_close(after[:, :-1], before[:, :-1], rtol=0, atol=0)
    assert not torch.allclose(after[:, -1], before[:, -1])


def test_patch_dropout_keeps_the_patches_in_order():
    model = create(patch_drop_rate=0.5).train()
    assert model.patch_drop.ordered
    assert model(images()).shape == (2, 7)


def test_every_token_of_every_image_depends_on_its_image_alone():
    model = create().double()
    x = images(batch=3, dtype=torch.float64)
    alone = torch.cat([model(one[None]) for one in x])
    torch.testing.assert_close(model(x), alone, rtol=0, atol=1e-12)


def test_other_sizes():
    model = create()
    model.set_input_size(img_size=(96, 48))
    assert model(images(height=96, width=48)).shape == (2, 7)
    with pytest.raises(AssertionError, match="doesn't match model"):
        model(images())
    dynamic = create(dynamic_img_size=True, reg_tokens=2)
    for height, width in ((64, 64), (32, 80), (16, 16)):
        assert dynamic(images(height=height, width=width)).shape == (2, 7)


def test_features():
    model = create(features_only=True, out_indices=(0, 2))
    assert [tuple(x.shape) for x in model(images())] == [(2, 192, 4, 4)] * 2
    fx = create(features_only=True, feature_cls="fx", out_indices=(0, 2))
    for tokens, features in zip(fx(images()), model(images()), strict=True):
        patches = tokens[:, 1:].transpose(1, 2).reshape(features.shape)
        torch.testing.assert_close(patches, features)


def test_pruned_layers_leave_the_others_as_they_are():
    model = create()
    expected = model.forward_intermediates(images(), indices=[1], intermediates_only=True)[0]
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([1]) == [1]
    assert len(pruned.blocks) == 2
    got = pruned.forward_intermediates(images(), indices=[1], intermediates_only=True)[0]
    assert torch.equal(got, expected)


def test_classifier_and_groups():
    model = create()
    model.reset_classifier(3, "avg")
    assert model(images()).shape == (2, 3)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups["blocks.1.attn.evolution.weight"] == groups["blocks.1.attn.qkv.weight"]
    assert "cls_token" in model.no_weight_decay()


def test_distilled_training_returns_both_predictions():
    model = create("ea_deit_tiny_distilled").train()
    model.set_distilled_training(True)
    of_class, of_distillation = model(images())
    assert of_class.shape == of_distillation.shape == (2, 7)
    torch.testing.assert_close(model.eval()(images()), (of_class + of_distillation) / 2)


def test_drop_path_and_dropout_are_in_use():
    model = create(drop_path_rate=0.5, attn_drop_rate=0.5).train()
    assert model.blocks[2].attn.attn_drop.p == 0.5
    assert model.blocks[2].drop_path1.drop_prob == 0.5
    block, x, map_before = model.blocks[2], torch.randn(2, 17, 192), torch.randn(2, 3, 17, 17)
    block.attn.attn_drop.p = 0.0
    for path, other, branch in (
        (block.drop_path1, block.drop_path2, lambda: block.mlp(block.norm2(x))),
        (block.drop_path2, block.drop_path1, lambda: block.attn(block.norm1(x), map_before)[0]),
    ):
        path.drop_prob, other.drop_prob = 1.0, 0.0  # only its branch is dropped
        torch.testing.assert_close(block(x, map_before)[0], x + branch())


def test_gate_and_dropouts_are_timms():
    options = {"num_heads": 3, "gated": True, "qkv_bias": True}
    plain, ours = timm.layers.Attention(192, **options), EvolvingAttention(192, **options)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 17, 192)
    torch.testing.assert_close(ours(x)[0], plain(x))
    model = create(attn_drop_rate=0.5).train()
    with collect_maps(model) as maps:
        model(images())
    for _, _, attn_probs in maps:  # before dropout
        torch.testing.assert_close(attn_probs.sum(-1), torch.ones(attn_probs.shape[:-1]))
    dropping = create(proj_drop_rate=0.5).train()
    dropping.blocks[0].mlp = torch.nn.Identity()
    assert not torch.equal(*(dropping.blocks[0](x)[0] for _ in range(2)))


@pytest.mark.parametrize("arguments", [{"is_causal": True}, {"attn_mask": torch.eye(17) < 1}])
def test_masks_reach_every_block(arguments):
    model = create()
    expected = model.forward_features(images(), **arguments)
    assert not torch.allclose(expected, model.forward_features(images()))
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        torch.testing.assert_close(model.forward_features(images(), **arguments), expected)
        last, _ = model.forward_intermediates(images(), **arguments)
        torch.testing.assert_close(last, expected)


def test_learned_mixing_under_autocast():
    model = create(learnable=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images()).float().square().sum()
    loss.backward()
    assert all(block.attn.evolution.alpha.grad.isfinite() for block in model.blocks[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_and_device_of_the_factory(dtype):
    model = create(dtype=dtype, learnable=True)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(images(dtype=dtype)).dtype == dtype
    meta = create(device="meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    torch.manual_seed(0)
    ready = meta.to_empty(device="cpu")
    ready.init_weights(needs_reset=True)
    assert all(p.isfinite().all() for p in ready.parameters())
    weight = ready.blocks[1].attn.evolution.weight
    assert 0 < weight.abs().max() <= (3 * 9) ** -0.5


@pytest.mark.slow
def test_script_trace_compile_and_export(reload):
    model = create(learnable=True)
    expected = model(images())
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(images()), expected)
    with torch.no_grad():
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(images()), expected)
    torch.testing.assert_close(reload(torch.jit.script(model))(images()), expected)
    torch.testing.assert_close(torch.export.export(model, (images(),)).module()(images()), expected)
    explanation = torch._dynamo.explain(model)(images())
    assert explanation.graph_break_count == 0, explanation.break_reasons
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), expected)


def test_channels_last():
    model = create().to(memory_format=torch.channels_last)
    x = images()
    expected = model(x)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("name", ["ea_vit_tiny", "ea_deit_small", "ea_deit_tiny_distilled"])
def test_plain_weights_leave_evolution_alone_fresh(name, tmp_path, caplog):
    plain = create(plain_version(name))
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    caplog.set_level("INFO")
    fresh = create(name, seed=1)
    by_path = create(name, seed=1, checkpoint_path=tmp_path / "plain.pth")
    overlay = {"file": str(tmp_path / "plain.pth"), "num_classes": 7}
    by_cfg = create(name, seed=1, pretrained=True, pretrained_cfg_overlay=overlay)
    for model in (by_path, by_cfg):
        for key, value in model.state_dict().items():
            source = fresh if "evolution" in key else plain
            assert torch.equal(value, source.state_dict()[key]), key
    assert "keep their initial values: blocks.1.attn.evolution.weight" in caplog.text


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    state = create("vit_tiny_patch16_224").state_dict()
    del state["blocks.1.attn.qkv.weight"]
    torch.save(state, tmp_path / "plain.pth")
    with pytest.raises(RuntimeError, match="blocks.1.attn.qkv.weight"):
        create(checkpoint_path=tmp_path / "plain.pth")
    state = create().state_dict()
    del state["blocks.1.attn.evolution.weight"]
    torch.save(state, tmp_path / "partial.pth")
    with pytest.raises(RuntimeError, match="blocks.1.attn.evolution.weight"):
        create(checkpoint_path=tmp_path / "partial.pth")
    state = create().state_dict()
    for name in ("weight", "bias"):
        del state[f"blocks.2.attn.evolution.{name}"]
    with pytest.raises(RuntimeError, match="blocks.2.attn.evolution.weight"):
        create().load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing.*blocks.1.attn.evolution.bias"):
        create(device="meta").load_state_dict(create("vit_tiny_patch16_224").state_dict())


def test_learnable_mixing_starts_from_a_checkpoint_without():
    source = create(alpha=0.3, beta=0.2)
    model = create(alpha=0.3, beta=0.2, learnable=True, seed=1)
    model.load_state_dict(source.state_dict())
    torch.testing.assert_close(model(images()), source(images()))


def test_wrapped_for_checkpointing_it_loads_what_it_loads_otherwise():
    def wrapped(**options):
        model = create(**options)
        apply_activation_checkpointing(model, check_fn=lambda x: isinstance(x, EvolvingAttention))
        return model

    model = wrapped(alpha=0.3, beta=0.0)
    model.load_state_dict(model.state_dict())
    trained = create(alpha=0.1, beta=0.2)
    model = wrapped()
    model.load_state_dict(trained.state_dict())
    assert torch.equal(model.eval()(images()), trained(images()))
    model = wrapped(alpha=0.1, beta=0.2)
    model.load_state_dict(create(plain_version("ea_vit_tiny")).state_dict())


def test_saved_for_the_hub_and_read_back(tmp_path):
    assert timm.models.get_model_args(create())["alpha"] == 0.5
    model = create(alpha=0.3, beta=0.2, learnable=True)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images()), model(images()))


def test_weights_that_nobody_published():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for ea_deit_small"):
        timm.create_model("ea_deit_small", pretrained=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\], got 1.5"),
        ({"beta": -0.1}, r"beta must lie in \[0, 1\], got -0.1"),
        ({"kernel_size": 4}, "kernel_size must be odd and positive .*, got 4"),
        ({"learnable": "false"}, "learnable must be True or False, got 'false'"),
        ({"alpha": "nan"}, r"alpha must lie in \[0, 1\], got 'nan'"),
        ({"alpha": True}, r"alpha must lie in \[0, 1\], got True"),
        ({"kernel_size": 3.0}, "kernel_size must be odd and positive .*, got 3.0"),
        ({"num_heads": 3.0}, "num_heads must be a whole number of 1 or more, got 3.0"),
        ({"num_heads": 0}, "num_heads must be a whole number of 1 or more, got 0"),
        ({"attn_layer": "diff"}, "attn_layer must be ea_timm's EvolvingAttention .* got 'diff'"),
        ({"block_fn": timm.models.vision_transformer.Block}, "block_fn must be .* EvolvingBlock"),
        ({"use_naflex": True}, "use_naflex must be False for ea_vit_tiny"),
        ({"features_only": True, "feature_cls": "list"}, "feature_cls must be 'getter' or 'fx'"),
        ({"features_only": True, "feature_cls": "hook"}, "feature_cls must be 'getter' or 'fx'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)


def test_bad_masks():
    model = create()
    ones = torch.ones(17, 17)
    with pytest.raises(ValueError, match="attn_mask must be None if is_causal is True"):
        model.forward_features(images(), attn_mask=ones.bool(), is_causal=True)
    with pytest.raises(ValueError, match="attn_mask must be bool .* or float, got torch.int64"):
        model.forward_features(images(), attn_mask=ones.long())
    for shape in [(16,), (17, 16), (3, 1, 1, 17), (1, 1, 1, 1, 17)]:
        with pytest.raises(ValueError, match="attn_mask must be broadcastable to .*, got "):
            model.forward_features(images(), attn_mask=torch.ones(shape))


def test_a_mask_of_tokens_alone():
    model = create()
    mask = torch.arange(17) != 5
    expected = model.forward_features(images(), attn_mask=mask.expand(2, 1, 17, 17))
    got = model.forward_features(images(), attn_mask=mask)
    torch.testing.assert_close(got, expected)


def test_a_mask_of_another_dtype():
    """As timm's fused attention takes it."""
    mask = torch.zeros(17, 17).masked_fill(torch.eye(17) == 1, -1e9)
    model = create().bfloat16()
    expected = model.forward_features(images().bfloat16(), attn_mask=mask.bfloat16())
    assert torch.equal(model.forward_features(images().bfloat16(), attn_mask=mask), expected)


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="num_heads must divide .* 192, got 5"):
        create(num_heads=5)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="not_an_option"):
        create(not_an_option=1)


def test_a_map_of_another_token_count():
    model = create()
    tokens = torch.randn(2, 10, 192)
    with pytest.raises(ValueError, match="prev_attn_logits has shape .*17, 17.* 10, 10"):
        model.blocks[1](tokens, torch.randn(2, 3, 17, 17))


def test_public_names():
    assert all(hasattr(ea_timm, name) for name in ea_timm.__all__)
