"""ea_resnet*: the official numbers, the plain ResNet without attention, timm's interface."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models import FeatureGraphNet
from timm.utils import AttentionExtract
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

from ea_timm import AugmentedConv2d, EvolvingAttention2d, EvolvingBasicBlock
from ea_timm.attention2d import RelativeLogits2d, resize_table
from evolving_attention import AttentionEvolution, reference

OFFICIAL = Path(__file__).parent / "data" / "aa_conv2d_official.npz"


def images(batch=2, height=64, width=64, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, height, width, generator=generator, dtype=dtype)


def create(name="ea_resnet50", seed=0, **options):
    """A ResNet with one or two blocks per stage, in eval mode, with non-trivial batch norms."""
    torch.manual_seed(seed)
    options = {"layers": (1, 2, 2, 2), "num_classes": 7, "zero_init_last": False, **options}
    model = timm.create_model(name, **options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def attentions(model):
    return [module for module in model.modules() if isinstance(module, EvolvingAttention2d)]


def gradients(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def official_layer(numbers, index, dtype):
    """An augmented convolution with the official weights (HWIO, to PyTorch's OIHW)."""
    alpha, beta = float(numbers["paper_alpha"]), float(numbers["paper_beta"])
    evolution = AttentionEvolution(8, alpha, beta) if index else None
    conv = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    layer = AugmentedConv2d(conv, num_heads=8, map_size=(6, 5), evolution=evolution)
    state = {}
    for key, _ in layer.named_parameters():
        name = key.removeprefix("attn.").removeprefix("position.")
        name = name.replace("evolution", "evolve").replace("weight", "kernel")
        value = torch.from_numpy(numbers[f"layer{index}.{name}"])
        state[key] = value.permute(3, 2, 0, 1) if name.endswith("kernel") else value
    layer.load_state_dict(state)
    return layer.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_official_code(dtype):
    numbers = np.load(OFFICIAL)
    x = torch.from_numpy(numbers["x"]).permute(0, 3, 1, 2).to(dtype)
    attn_logits = None
    for index in range(2):
        x, attn_logits = official_layer(numbers, index, dtype)(x, attn_logits)
        out = torch.from_numpy(numbers[f"layer{index}.out"]).permute(0, 3, 1, 2).to(dtype)
        torch.testing.assert_close(x, out, rtol=0, atol=1e-5)
        expected = torch.from_numpy(numbers[f"layer{index}.logits"]).to(dtype)
        torch.testing.assert_close(attn_logits, expected, rtol=0, atol=1e-5)
        x = x.relu()


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("ea_resnet34", 18_506_408),
        ("ea_resnet50", 24_967_712),
        ("ea_resnet101", 43_440_728),
        ("ea_resnet152", 58_659_248),
    ],
)
def test_parameters(name, count):
    """As in the authors' code; but for ea_resnet50, their PyTorch code without the 3x3's biases."""
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == count
    plain = timm.create_model(name.removeprefix("ea_"), device="meta")
    blocks = sum(len(getattr(plain, stage)) for stage in ("layer2", "layer3", "layer4"))
    assert len(attentions(model)) == blocks * (2 if name == "ea_resnet34" else 1)


def test_shapes_follow_the_official_code():
    """Stages, channels, pooling, map sizes, and which block evolves from which."""
    model = timm.create_model("ea_resnet50").eval()
    assert not any(isinstance(m, AugmentedConv2d) for m in model.layer1.modules())
    maps = list(AttentionExtract(model, method="hook")(images(1, 224, 224)).values())
    assert [m.shape[1:] for m in maps] == [(8, 196, 196)] * 10 + [(8, 49, 49)] * 3
    for stage, planes, side in (("layer2", 128, 14), ("layer3", 256, 14), ("layer4", 512, 7)):
        for index, block in enumerate(getattr(model, stage)):
            attn = block.conv2.attn
            assert block.conv2.conv.out_channels == planes - planes // 8
            assert (attn.key_channels, attn.value_channels) == (planes // 4, planes // 8)
            assert attn.position.r_height.shape == (2 * side - 1, planes // 4 // 8)
            assert attn.stride == (2 if index == 0 else 1)
            assert attn.downsample == (stage == "layer2")
            # the first of all, and the first after the map has become smaller, are plain
            assert (attn.evolution is None) == (index == 0 and stage != "layer3")
    assert model.layer3[0].conv2.attn.evolution.mixing == (0.5, 1.0)


def test_shapes_of_resnet34_follow_the_authors_pytorch_code():
    """Both convolutions of every block are augmented, and each map evolves from the one before."""
    model = timm.create_model("ea_resnet34").eval()
    assert not any(isinstance(m, AugmentedConv2d) for m in model.layer1.modules())
    maps = list(AttentionExtract(model, method="hook")(images(1, 224, 224)).values())
    assert [m.shape[1:] for m in maps] == [(8, 196, 196)] * 20 + [(8, 49, 49)] * 6
    for stage, planes, side in (("layer2", 128, 14), ("layer3", 256, 14), ("layer4", 512, 7)):
        for index, block in enumerate(getattr(model, stage)):
            for conv, first in ((block.conv1, True), (block.conv2, False)):
                attn = conv.attn
                assert conv.conv.out_channels == planes - planes // 4
                assert (attn.key_channels, attn.value_channels) == (planes // 4, planes // 4)
                assert attn.position.r_height.shape == (2 * side - 1, planes // 4 // 8)
                assert attn.stride == (2 if index == 0 and first else 1)
                assert attn.downsample == (stage == "layer2")
                plain = first and index == 0 and stage != "layer3"
                assert (attn.evolution is None) == plain


@pytest.mark.parametrize("name", ["ea_resnet34", "ea_resnet50"])
def test_every_attention_gets_the_map_of_the_one_before(name):
    model = create(name)
    taken, given = [], []

    def keep(module, args, output):
        taken.append(args[1])
        given.append(output.attn_logits)

    for attn in attentions(model):
        attn.register_forward_hook(keep)
    model(images())
    assert taken[0] is None and len(taken) == (12 if name == "ea_resnet34" else 6)
    assert all(a is b for a, b in zip(taken[1:], given, strict=False))


@pytest.mark.parametrize("name", ["ea_resnet34", "ea_resnet50"])
def test_where_attention_is_silent_it_is_the_plain_resnet(name):
    """With attention's output set to 0, and a plain ResNet without the replaced channels."""
    plain = create(name.removeprefix("ea_")).double()
    model = create(name).double()
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, AugmentedConv2d):
                plain.get_submodule(path).weight[module.conv.out_channels :] = 0
        model.load_state_dict(plain.state_dict())
        for attn in attentions(model):
            attn.proj.weight.zero_()
            attn.proj.bias.zero_()
    x = images(dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-12)
    ours = model.forward_intermediates(x, indices=[0, 1, 3])
    torch.testing.assert_close(ours, plain.forward_intermediates(x, indices=[0, 1, 3]))
    expected, got = gradients(plain, x), gradients(model, x)
    for name in expected.keys() & got.keys():
        torch.testing.assert_close(got[name], expected[name], rtol=1e-9, atol=1e-12)


def test_without_evolution_every_attention_is_plain():
    """alpha = beta = 0 equals the same network that hands no map on."""
    model = create(alpha=0.0, beta=0.0).double()
    x = images(dtype=torch.float64)
    expected = model(x)
    for attn in attentions(model):
        attn.evolution = None
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("downsample", [False, True])
def test_one_attention_against_the_equations(stride, downsample):
    """Pooling, queries, relative positions and evolution, written out pixel by pixel."""
    torch.manual_seed(0)
    alpha, beta, heads, dim = 0.25, 0.375, 2, 3
    evolution = AttentionEvolution(heads, alpha, beta)
    H, W = 3, 2
    layer = EvolvingAttention2d(
        5, heads * dim, 4, heads, (H, W), stride, downsample, evolution=evolution
    ).double()
    scale = stride * (2 if downsample else 1)
    x = torch.randn(2, 5, H * scale, W * scale, dtype=torch.float64)
    prev = torch.randn(2, heads, H * W, H * W, dtype=torch.float64)

    def mean_of_neighbours(x):
        out = torch.empty(*x.shape[:2], -(-x.shape[2] // 2), -(-x.shape[3] // 2), dtype=x.dtype)
        for row in range(out.shape[2]):
            for column in range(out.shape[3]):
                rows = slice(max(2 * row - 1, 0), 2 * row + 2)
                columns = slice(max(2 * column - 1, 0), 2 * column + 2)
                out[:, :, row, column] = x[:, :, rows, columns].mean((2, 3))
        return out

    pooled = mean_of_neighbours(x) if stride == 2 else x
    shape = pooled.shape[2:]
    pooled = mean_of_neighbours(pooled) if downsample else pooled
    k, q, v = layer.kqv(pooled).split([6, 6, 4], dim=1)
    logits = torch.empty(2, heads, H * W, H * W, dtype=torch.float64)
    for head in range(heads):
        channels = slice(head * dim, (head + 1) * dim)
        for query in range(H * W):
            y, x1 = divmod(query, W)
            q1 = q[:, channels, y, x1] * dim**-0.5
            for key in range(H * W):
                y2, x2 = divmod(key, W)
                k1 = k[:, channels, y2, x2]
                k1 = k1 + layer.position.r_height[y2 - y + H - 1]
                k1 = k1 + layer.position.r_width[x2 - x1 + W - 1]
                logits[:, head, query, key] = (q1 * k1).sum(1)
    logits = reference.evolve(logits, prev, evolution.weight, evolution.bias, alpha, beta)
    values = v.reshape(2, heads, 2, H * W).transpose(2, 3)
    attended = reference.attend(logits, values).transpose(2, 3).reshape(2, 4, H, W)
    attended = layer.proj(attended)
    if downsample:
        attended = nn.functional.interpolate(attended, shape, mode="bilinear")

    got, got_logits = layer(x, prev)
    torch.testing.assert_close(got_logits, logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(got, attended, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["ea_resnet34", "ea_resnet50"])
def test_checkpointing_changes_no_gradient(name):
    model = create(name, learnable=True, alpha=0.4, beta=0.6).double()
    x = images(dtype=torch.float64)
    expected = gradients(model, x)
    model.set_grad_checkpointing()
    got = gradients(model, x)
    for name, grad in expected.items():
        assert grad.abs().sum() > 0, name
        torch.testing.assert_close(got[name], grad, rtol=0, atol=0)
    features = create(features_only=True).train()
    features.set_grad_checkpointing(True)
    sum(f.mean() for f in features(images())).backward()
    assert all(p.grad is not None for p in features.parameters())


@pytest.mark.parametrize("size", [(32, 32), (96, 96), (100, 70), (224, 224)])
def test_other_sizes(size):
    """By resizing the tables during the forward pass, and with a model created for the size."""
    model = create()
    x = images(1, *size)
    expected = model(x)
    made_for_it = create(seed=1, img_size=size)
    made_for_it.load_state_dict(model.state_dict())
    torch.testing.assert_close(made_for_it(x), expected)
    heights = {attn.position.r_height.shape[0] for attn in attentions(made_for_it)}
    assert heights == {2 * -(-size[0] // 16) - 1, 2 * -(-size[0] // 32) - 1}


def test_tables_take_the_size_of_those_in_the_file():
    """Of a model that was created without img_size: nothing is resized, so nothing is lost."""
    trained = create(img_size=160)
    loaded = timm.create_model("ea_resnet50", layers=(1, 2, 2, 2), num_classes=7).eval()
    table = attentions(loaded)[0].position.r_height
    loaded.load_state_dict(trained.state_dict())
    assert attentions(loaded)[0].position.r_height is table
    assert loaded.img_size == trained.img_size == (160, 160)
    assert timm.models.get_model_input_config(loaded)["input_size"] == (3, 160, 160)
    for size in (160, 96):
        assert torch.equal(loaded(images(1, size, size)), trained(images(1, size, size)))
    loaded.load_state_dict(create(img_size=(64, 96)).state_dict())
    assert loaded.img_size == (64, 96)


def test_plain_filters_in_groups_are_an_error():
    """Their first channels read other input channels than in the augmented convolution."""
    options = {"cardinality": 32, "base_width": 4}
    with pytest.raises(ValueError, match="layer2.0.conv2 has 32 groups .* with cardinality=1"):
        create(**options).load_state_dict(create("resnet50", **options).state_dict())
    create(seed=1, **options).load_state_dict(create(**options).state_dict())


def test_resized_tables_keep_direction_and_centre():
    table = torch.linspace(-1, 1, 13)[:, None].repeat(1, 2)
    for length in (1, 3, 27):
        resized = resize_table(table, length)
        assert resized.shape == (length, 2)
        assert (resized.diff(dim=0) > 0).all()
        expected = torch.linspace(-1, 1, length) if length > 1 else torch.zeros(1)
        torch.testing.assert_close(resized, expected[:, None].repeat(1, 2), atol=1e-6, rtol=0)
        assert resized.is_contiguous()  # as files of safetensors need it
    position = RelativeLogits2d((4, 3), 2)
    q = torch.randn(1, 2, 4, 3, 2)
    assert position(q).shape == (1, 2, 12, 12)


@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilated_stages(output_stride):
    """A map hands on wherever its size stays the same."""
    model = create(output_stride=output_stride)
    assert model(images()).shape == (2, 7)
    evolving = [
        [b.conv2.attn.evolution is not None for b in s] for s in (model.layer3, model.layer4)
    ]
    assert evolving == [[output_stride == 16, True], [True, True]]


@pytest.mark.parametrize(
    "options",
    [
        {"stem_type": "deep", "stem_width": 32, "avg_down": True},
        {"aa_layer": timm.layers.BlurPool2d},
        {"in_chans": 1},
        {"drop_path_rate": 0.2, "drop_block_rate": 0.1, "attn_drop_rate": 0.1},
        {"block_args": {"attn_layer": "se"}},
        {"cardinality": 2, "base_width": 32},
        {"replace_stem_pool": True},
        {"num_heads": 4},
        {"block": EvolvingBasicBlock},
        {"block": EvolvingBasicBlock, "aa_layer": timm.layers.BlurPool2d, "avg_down": True},
        {"block": EvolvingBasicBlock, "output_stride": 8, "block_args": {"attn_layer": "se"}},
        {"block": EvolvingBasicBlock, "drop_path_rate": 0.2, "drop_block_rate": 0.1},
    ],
)
def test_options_of_timm(options):
    model = create(**options).train()
    x = images()[:, : options.get("in_chans", 3)]
    model(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_features_only(reload):
    model = create(features_only=True)
    x = images()
    shapes = [tuple(f.shape[1:]) for f in model(x)]
    assert shapes == [(64, 32, 32), (256, 16, 16), (512, 8, 8), (1024, 4, 4), (2048, 2, 2)]
    torch.testing.assert_close(reload(torch.jit.script(model))(x), model(x))
    whole = create()
    features = whole.forward_intermediates(x, intermediates_only=True)
    fx = FeatureGraphNet(whole, out_indices=(0, 1, 2, 3, 4)).eval()
    torch.testing.assert_close(fx(x), features)
    plain = create("resnet50")
    for model in (whole, plain):
        final, _ = model.forward_intermediates(x, [0], stop_early=True)
        assert final.shape == (2, 64, 16, 16)
    early = whole.forward_intermediates(x, [1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early, features[1:2])
    two = create(features_only=True, out_indices=(1, 3), feature_cls="fx")
    assert [tuple(f.shape[1:]) for f in two(x)] == [shapes[1], shapes[3]]
    for wrong in ("list", "hook", "dict"):
        with pytest.raises(ValueError, match=f"feature_cls must be 'getter' or 'fx'.*{wrong}"):
            create(features_only=True, feature_cls=wrong)


@pytest.mark.parametrize("index", range(5))
def test_pruned_stages(index):
    model = create().train()
    model.prune_intermediate_layers([index])
    model.set_grad_checkpointing()
    final, _ = model.forward_intermediates(images(), [index])
    (final.mean() + model.forward_features(images()).mean()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_drop_block_and_dropout_of_attention():
    model = create(attn_drop_rate=0.3)
    attentions = [m for m in model.modules() if isinstance(m, EvolvingAttention2d)]
    assert {attention.attn_drop.p for attention in attentions} == {0.3}
    model = create(drop_block_rate=0.9, layers=(1, 1, 2, 2)).train()
    x = torch.randn(2, 1024, 8, 8)
    block = model.layer3[1]
    map_before = torch.randn(2, 8, 64, 64)
    assert not torch.equal(block(x, map_before)[0], block(x, map_before)[0])


def test_initial_weights_are_those_of_the_official_code():
    for name, weight in create(layers=(1, 1, 1, 1)).named_parameters():
        if name.endswith(("r_height", "r_width")) and weight.numel() > 100:
            assert weight.std().item() == pytest.approx(weight.shape[1] ** -0.5, rel=0.3), name
        if name.endswith("kqv.weight"):
            assert weight.std().item() == pytest.approx(weight[0].numel() ** -0.5, rel=0.1), name


def test_an_empty_batch():
    assert create()(images()[:0]).shape == (0, 7)


@pytest.mark.parametrize("name", ["ea_resnet34", "ea_resnet50"])
@pytest.mark.slow
def test_script_trace_compile_export_channels_last(name, reload):
    model = create(name, learnable=True)
    x = images()
    expected = model(x)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
    torch.testing.assert_close(reload(torch.jit.script(model))(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    model = model.to(memory_format=torch.channels_last)
    got = model(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_amp_and_dtypes():
    model = create(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(images(dtype=torch.bfloat16)).dtype == torch.bfloat16
    model = create().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images()).float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_wrapped_for_checkpointing_it_loads_what_it_loads_otherwise():
    def wrapped():
        model = create(alpha=0.1, beta=0.2)
        apply_activation_checkpointing(model, check_fn=lambda x: isinstance(x, AugmentedConv2d))
        return model

    model = wrapped()
    model.load_state_dict(create("resnet50").state_dict())
    trained = create(alpha=0.1, beta=0.2, img_size=64, seed=1)
    model.load_state_dict(trained.state_dict())
    assert model.img_size == (64, 64)
    assert torch.equal(model(images()), trained(images()))


def test_plain_weights_leave_attention_alone_fresh(tmp_path, caplog):
    plain = create("resnet50").state_dict()
    torch.save(plain, tmp_path / "plain.pth")
    caplog.set_level("INFO")
    fresh = create(seed=1).state_dict()
    overlay = {"file": str(tmp_path / "plain.pth"), "num_classes": 7}
    for model in (
        timm.create_model(
            "ea_resnet50",
            layers=(1, 2, 2, 2),
            num_classes=7,
            checkpoint_path=tmp_path / "plain.pth",
        ),
        create(seed=1, pretrained=True, pretrained_cfg_overlay=overlay),
    ):
        for key, value in model.state_dict().items():
            if ".conv2.conv." in key:
                weight = plain[key.replace(".conv2.conv.", ".conv2.")]
                assert torch.equal(value, weight[: value.shape[0]])
            elif ".attn." not in key and "running" not in key:
                assert torch.equal(value, plain[key]), key
            assert ".attn." not in key or value.shape == fresh[key].shape
    assert "keep their initial values: layer2.0.conv2.attn" in caplog.text


def test_a_checkpoint_that_does_not_fit_is_refused():
    state = create().state_dict()
    del state["layer3.1.conv2.attn.kqv.weight"]
    with pytest.raises(RuntimeError, match="layer3.1.conv2.attn.kqv.weight"):
        create().load_state_dict(state)
    state = create("resnet50").state_dict()
    weight = state["layer3.1.conv2.weight"]
    for wrong in (weight[:, :5], weight[:224], torch.cat([weight, weight])):
        state["layer3.1.conv2.weight"] = wrong
        with pytest.raises(RuntimeError, match="layer3.1.conv2.(conv.)?weight"):
            create().load_state_dict(state)
    state = create().state_dict()  # one block plain, the others not
    state = {k: v for k, v in state.items() if "layer4.1.conv2" not in k}
    state["layer4.1.conv2.weight"] = create("resnet50").state_dict()["layer4.1.conv2.weight"]
    with pytest.raises(RuntimeError, match="layer4.1.conv2.attn.kqv.weight"):
        create().load_state_dict(state)


def test_saved_for_the_hub_and_read_back(tmp_path):
    """Also with the configuration of a plain model, as for loading its weights."""
    plain = timm.get_pretrained_cfg("resnet50.a1_in1k")
    for number, cfg in enumerate((None, plain)):
        options = {"layers": (1, 1, 1, 1), "alpha": 0.2, "img_size": 96, "pretrained_cfg": cfg}
        model = timm.create_model("ea_resnet50", **options).eval()
        timm.models.save_for_hf(model, tmp_path / str(number), safe_serialization=True)
        again = timm.create_model(f"local-dir:{tmp_path / str(number)}", pretrained=True).eval()
        assert torch.equal(again(images()), model(images()))


def test_weights_drawn_anew():
    model = create()
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.init_weights()
    for name, p in model.named_parameters():
        if "attn" in name:
            assert name.endswith("bias") or not torch.equal(p, before[name]), name
            assert not name.endswith("bias") or not p.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1}, r"alpha must lie in \[0, 1\], got -1"),
        ({"beta": 2}, r"beta must lie in \[0, 1\], got 2"),
        ({"kernel_size": 2}, "kernel_size must be odd and positive .*, got 2"),
        ({"learnable": 0}, "learnable must be True or False, got 0"),
        ({"img_size": 0}, "img_size must be one or two positive whole numbers .*, got 0"),
        ({"img_size": 224.0}, "img_size must be .* whole numbers .*, got 224.0"),
        ({"img_size": (1, 2, 3)}, r"img_size must be one or two .*, got \(1, 2, 3\)"),
        ({"attn_drop_rate": "0.5"}, r"attn_drop_rate must lie in \[0, 1\], got '0.5'"),
        ({"num_heads": "8"}, "num_heads must be a whole number of 1 or more, got '8'"),
        ({"num_heads": 3}, "num_heads must divide the attention's key channels .*num_heads=3"),
        ({"num_heads": 32}, "num_heads must divide the attention's value channels .*num_heads=32"),
        (
            {"block": nn.Identity},
            "block must be ea_timm's EvolvingBottleneck or EvolvingBasicBlock",
        ),
        ({"channels": (64, 100, 256, 512)}, "output channels that 8 divides.* got 100 channels"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)


def test_parts_that_do_not_fit():
    with pytest.raises(ValueError, match=r"map_size must be 1 or more each way, got \(0, 4\)"):
        EvolvingAttention2d(8, 8, 4, 2, (0, 4))
    with pytest.raises(ValueError, match="num_heads must be a whole number of 1 or more, got 0"):
        EvolvingAttention2d(8, 8, 4, 0, (4, 4))
    for options in ({}, {"padding": 1, "stride": (1, 2)}, {"padding": 1, "dilation": 2}):
        with pytest.raises(ValueError, match="must be padded to the size of its input"):
            AugmentedConv2d(torch.nn.Conv2d(8, 16, 3, **options), 2, (4, 4))


def test_a_map_of_another_token_count():
    layer = EvolvingAttention2d(8, 8, 4, 2, (4, 4), evolution=AttentionEvolution(2, 0.5, 1.0))
    with pytest.raises(ValueError, match="prev_attn_logits has shape .*16, 16.* 9, 9"):
        layer(torch.randn(2, 8, 3, 3), torch.randn(2, 2, 16, 16))
