"""Collecting, measuring and drawing the maps of real models."""
# ruff: noqa: F811 (a fixture of another file is an argument here)

import itertools
import re
import shutil
from pathlib import Path

import matplotlib
import networkx
import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text
from PIL import Image
from scipy.spatial.distance import jensenshannon
from test_fairseq_commands import TRAINING, USER_DIR, data, fairseq  # noqa: F401
from test_time_series import NETWORK, make_dataset, task_of
from timm.utils import AttentionExtract

import ea_timm  # noqa: F401 (registers the models)
from ea_aeon import EADCTransformerClassifier
from ea_aeon.network import DCTransformer
from ea_maps import __main__ as command_line
from ea_maps import draw, measure, view
from ea_maps import image as images
from ea_maps import sentence as sentences_
from ea_maps.page import as_page
from evolving_attention import AttentionMap, collect_maps

SMALL = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 3}


def vit(**options):
    torch.manual_seed(0)
    return timm.create_model("ea_vit_tiny", **{**SMALL, **options}).eval()


def pixels(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def assert_consistent(maps):
    """The probabilities are the softmax of the logits over the visible keys."""
    for name, attn_logits, attn_probs in maps:
        assert attn_logits.shape == attn_probs.shape
        assert attn_logits.isfinite().all(), name
        seen = attn_logits.masked_fill(attn_probs == 0, float("-inf")).softmax(-1)
        torch.testing.assert_close(attn_probs, seen.to(attn_probs.dtype), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("plain", [False, True])
def test_maps_of_a_vit_are_those_timm_extracts(plain):
    model = vit(**({"alpha": 0.0, "beta": 0.0} if plain else {}))
    x = pixels(2, 3, 32, 32)
    expected = model(x)
    with collect_maps(model) as maps:
        torch.testing.assert_close(model(x), expected, atol=0, rtol=0)
    assert [m.name for m in maps] == [f"blocks.{i}.attn" for i in range(3)]
    assert_consistent(maps)
    extracted = AttentionExtract(model, method="hook")(x)
    for ours, theirs in zip(maps, extracted.values(), strict=True):
        torch.testing.assert_close(ours.attn_probs, theirs, atol=0, rtol=0)
    # The next layer evolves from what was collected.
    if not plain:
        tokens = model.embed(x)
        tokens, first = model.blocks[0](tokens)
        torch.testing.assert_close(first, maps[0].attn_logits, atol=0, rtol=0)
        torch.testing.assert_close(model.blocks[1](tokens, first)[1], maps[1].attn_logits)


def test_nothing_stays_behind():
    model = vit()
    with collect_maps(model) as maps:
        model(pixels(1, 3, 32, 32))
    model(pixels(1, 3, 32, 32))
    assert len(maps) == 3
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(KeyError), collect_maps(model):
        raise KeyError
    assert not any(module._forward_hooks for module in model.modules())


def test_gradients_flow_through_the_maps():
    model = vit()
    with collect_maps(model) as maps:
        model(pixels(1, 3, 32, 32))
    maps[-1].attn_probs.square().sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    assert model.blocks[2].attn.evolution.weight.grad.abs().sum() > 0
    with torch.no_grad(), collect_maps(model) as maps:
        model(pixels(1, 3, 32, 32))
    assert not maps[0].attn_logits.requires_grad


def test_maps_of_a_resnet():
    torch.manual_seed(0)
    model = timm.create_model("ea_resnet50", img_size=64).eval()
    with torch.no_grad(), collect_maps(model) as maps:
        model(pixels(1, 3, 64, 96))
    assert_consistent(maps)
    assert [m.attn_logits.shape[-1] for m in maps] == [4 * 6] * 10 + [2 * 3] * 3


@pytest.mark.parametrize("plain", [False, True])
def test_maps_of_a_translation_model(build, sentences, task, plain):
    options = {"ea_alpha": 0.0, "ea_beta": 0.0} if plain else {"ea_alpha": 0.3, "ea_beta": 0.4}
    model = build(**options)
    src, tgt = sentences(2, 7), sentences(2, 5, seed=1)
    src[1, 5:] = task.source_dictionary.pad()
    lengths = torch.tensor([7, 5])
    expected = model(src, lengths, tgt)[0]
    with torch.no_grad(), collect_maps(model) as maps:
        logits, extra = model(src, lengths, tgt, alignment_layer=2, alignment_heads=2)
    torch.testing.assert_close(logits, expected, atol=1e-5 if plain else 0, rtol=0)
    assert [m.name for m in maps] == [f"encoder.layers.{i}.self_attn" for i in range(3)] + [
        f"decoder.layers.{i}.{attention}" for i in range(3) for attention in ATTENTIONS
    ]
    assert_consistent([m for m in maps if m.name.startswith("decoder")])
    assert_consistent(
        [m._replace(attn_logits=m.attn_logits[:1], attn_probs=m.attn_probs[:1]) for m in maps]
    )
    for m in maps:
        if m.name.endswith("encoder_attn") or m.name.startswith("encoder"):
            assert (m.attn_probs[1, :, :, 5:] == 0).all()
        else:
            assert (m.attn_probs.triu(1) == 0).all()
    # fairseq's own way to the last encoder-decoder attention, whose heads it averages.
    torch.testing.assert_close(
        maps[-1].attn_probs.mean(1)[:, :, :], extra["attn"][0], atol=1e-6, rtol=0
    )


ATTENTIONS = ("self_attn", "encoder_attn")


def test_maps_of_time_series():
    torch.manual_seed(0)
    network = DCTransformer(2, 3, 9, d_model=16, ffn_dim=8, num_heads=2, attention_dim=4).eval()
    with torch.no_grad(), collect_maps(network) as maps:
        network(pixels(2, 9, 2), torch.tensor([9, 6]))
    assert_consistent(maps)
    assert len(maps) == 8
    assert (maps[3].attn_probs[1, :, :, 6:] == 0).all()


def test_what_cannot_be_collected_says_so():
    plain = timm.create_model("vit_tiny_patch16_224")
    message = "model must have attentions of this project"
    with pytest.raises(ValueError, match=message), collect_maps(plain):
        pass
    with pytest.raises(ValueError, match="model did not run"), collect_maps(vit()):
        pass


def probabilities(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(shape, generator=generator)).double().softmax(-1)


def test_entropy_and_distance():
    uniform = torch.full((1, 8), 1 / 8, dtype=torch.float64)
    one, other = torch.eye(8, dtype=torch.float64)[:2].split(1)
    assert measure.entropy(uniform).item() == pytest.approx(3)
    assert measure.entropy(one).item() == 0
    assert measure.js_distance(one, other).item() == pytest.approx(1)
    assert measure.js_distance(uniform, uniform).item() == 0
    first, second = probabilities(5, 9), probabilities(5, 9, seed=1)
    expected = jensenshannon(first, second, axis=1, base=2)
    np.testing.assert_allclose(measure.js_distance(first, second), expected, rtol=1e-9)
    torch.testing.assert_close(
        measure.js_distance(first, second), measure.js_distance(second, first)
    )


def test_movement():
    first, second = probabilities(2, 3, 4, 5), probabilities(2, 3, 4, 5, seed=1)
    small = probabilities(2, 3, 2, 2)
    layers = measure.movement(
        [AttentionMap(str(i), x, x) for i, x in enumerate((first, second, second, small))]
    )
    assert layers[0].distance is None and layers[3].distance is None
    assert not layers[2].distance.any()  # the layer before is the same
    expected = jensenshannon(first.numpy(), second.numpy(), axis=3, base=2).mean((0, 2))
    np.testing.assert_allclose(layers[1].distance, expected, rtol=1e-9)
    means = first.mean(1).numpy(), second.mean(1).numpy()
    expected = jensenshannon(*means, axis=2, base=2).mean()
    assert layers[1].mean_distance.item() == pytest.approx(expected)
    lines = measure.table(layers).splitlines()
    assert len(lines) == 6
    assert f"{layers[1].distance.mean():.3f} | {expected:.3f}" in lines[3]


def self_attention(layers, tokens, batch=2, heads=3, causal=False):
    logits = 2 * torch.randn(
        layers, batch, heads, tokens, tokens, generator=torch.Generator().manual_seed(tokens)
    )
    if causal:
        logits += torch.full((tokens, tokens), float("-inf")).triu(1)
    return [AttentionMap(f"layers.{i}", x, x.softmax(-1)) for i, x in enumerate(logits)]


def residual(attention, case):
    """A layer's map of one sentence, as in the paper: 0.5 W_att + 0.5 I."""
    probs = attention.attn_probs[case].double().mean(0).numpy()
    return 0.5 * probs + 0.5 * np.eye(len(probs))


@pytest.mark.parametrize("causal", [False, True])
def test_rollout(causal):
    maps = self_attention(4, 6, causal=causal)
    found = measure.rollout(maps)
    assert [x.name for x in found] == [x.name for x in maps]
    for case in range(2):
        expected = np.eye(6)
        for attention, rolled in zip(maps, found, strict=True):
            expected = residual(attention, case) @ expected
            np.testing.assert_allclose(rolled.attn_probs[case, 0], expected, rtol=1e-9)
            np.testing.assert_allclose(rolled.attn_probs[case].sum(-1), 1, rtol=1e-6)
            assert not causal or not rolled.attn_probs.triu(1).any()
            torch.testing.assert_close(rolled.attn_logits.exp(), rolled.attn_probs)


@pytest.mark.parametrize(("layers", "tokens", "causal"), [(3, 4, False), (2, 6, True), (4, 1, 0)])
def test_flow(layers, tokens, causal):
    """It is networkx's maximum flow, each token's divided by their sum."""
    maps = self_attention(layers, tokens, causal=causal)
    found = measure.flow(maps)
    for case in range(2):
        graph = networkx.DiGraph()
        for layer, attention in enumerate(maps):
            for (query, key), weight in np.ndenumerate(residual(attention, case)):
                graph.add_edge((layer + 1, query), (layer, key), capacity=weight)
            expected = np.array(
                [
                    [
                        networkx.maximum_flow_value(graph, (layer + 1, query), (0, key))
                        for key in range(tokens)
                    ]
                    for query in range(tokens)
                ]
            )
            expected /= expected.sum(1, keepdims=True)
            np.testing.assert_allclose(found[layer].attn_probs[case, 0], expected, atol=1e-7)


def test_rollout_and_flow_are_those_of_the_evolved_maps():
    model = vit(alpha=0.5, beta=1.0)
    x = pixels(1, 3, 32, 32)
    with torch.no_grad(), collect_maps(model) as maps:
        model(x)
    last = model.blocks[2].attn
    assert last.evolution is not None and not torch.equal(maps[2].attn_logits, maps[1].attn_logits)
    expected = residual(maps[2], 0) @ residual(maps[1], 0) @ residual(maps[0], 0)
    np.testing.assert_allclose(measure.rollout(maps)[2].attn_probs[0, 0], expected, rtol=1e-9)


@pytest.mark.parametrize("summary", measure.SUMMARIES.values())
def test_what_has_no_rollout_or_flow_is_named(summary):
    maps = self_attention(2, 4)
    for name, other in (("cross", (2, 3, 4, 5)), ("smaller", (2, 3, 3, 3))):
        with pytest.raises(ValueError, match=f"need self-attention over the same .* {name} has"):
            summary([*maps, AttentionMap(name, None, torch.rand(other))])


def test_a_flow_that_would_never_end_is_named():
    with pytest.raises(ValueError, match="too long for 197 tokens in 12 layers; use rollout"):
        measure.flow(self_attention(12, 197, batch=1, heads=1))


@given(st.integers(1, 200), st.integers(1, 20))
def test_large_models_are_sampled_not_cut_off(count, limit):
    chosen = draw.spread(count, limit)
    assert chosen == sorted(set(chosen)) and 0 < len(chosen) <= limit
    assert chosen[0] == 0
    if limit > 1:
        assert chosen[-1] == count - 1


def test_queries_are_rows_and_keys_columns():
    queries, keys = ["</s>", "a", "b"], ["x", "y", "z", "</s>"]
    maps = [AttentionMap(str(i), p, p) for i, p in enumerate(probabilities(2, 1, 2, 3, 4))]
    figure = draw.draw_tokens({"ours": maps}, queries, keys, layers=6, heads=4)
    axes = [a for a in figure.findobj(draw.Axes) if a.get_title()]
    assert [a.get_title() for a in axes] == [
        f"layer {layer}, head {head}" for layer in (1, 2) for head in (1, 2)
    ]
    np.testing.assert_allclose(axes[3].images[0].get_array(), maps[1].attn_probs[0, 1], atol=1e-6)
    figure.draw_without_rendering()
    corner = axes[2]
    assert [t.get_text() for t in corner.get_yticklabels()] == queries
    assert [t.get_text() for t in corner.get_xticklabels()] == keys
    assert corner.yaxis_inverted()  # the first query is at the top


@pytest.mark.parametrize(("queries", "keys"), [(70, 70), (12, 40), (40, 12), (2, 24), (24, 3)])
def test_labels_do_not_touch(queries, keys):
    names = [f"a-rather-long-token-{i}" for i in range(70)]
    maps = [AttentionMap("0", p, p) for p in [probabilities(1, 2, queries, keys)]]
    figure = draw.draw_tokens({"ours": maps}, names[:queries], names[:keys], layers=1, heads=2)
    figure.draw_without_rendering()
    axes = next(a for a in figure.findobj(draw.Axes) if a.get_title())
    for labels, low, high in (
        (axes.get_xticklabels(), "x0", "x1"),
        (axes.get_yticklabels(), "y0", "y1"),
    ):
        boxes = sorted((t.get_window_extent() for t in labels), key=lambda box: getattr(box, low))
        assert 1 < len(boxes) <= draw.LABELS
        for before, after in itertools.pairwise(boxes):
            assert getattr(before, high) <= getattr(after, low)


def test_dollars_are_no_formula(tmp_path):
    names = ["$$", "$x$", "a_b"]
    maps = [AttentionMap("0", p, p) for p in [probabilities(1, 1, 3, 3)]]
    figure = draw.draw_tokens({"$a$": maps, "$": maps}, names, names, layers=1, heads=1)
    (path,) = draw.save({None: figure}, tmp_path / "maps.svg")
    assert path.stat().st_size > 1000


def test_matplotlibrc_does_not_turn_the_pictures_over(tmp_path):
    """Names stay as they are, and the first row at the top, whatever matplotlibrc says."""
    names = ["a_b", "$", "%"]
    maps = [AttentionMap("0", p, p) for p in [probabilities(1, 1, 3, 3)]]
    look = images.look(vit(), Image.fromarray((255 * pixels(32, 32, 3)).byte().numpy()))
    mine = {"image.origin": "lower", "axes.grid": True, "image.interpolation": "hanning"}
    with matplotlib.rc_context({**mine, "text.usetex": True}):
        figures = [
            draw.draw_tokens({"$": maps, "a_b": maps}, names, names, layers=1, heads=1),
            draw.draw_image({"$": look.maps}, {"$": look}, layers=1, heads=1),
            draw.draw_series({"$": maps}, np.random.rand(2, 3), layers=1, heads=1),
        ]
        moved = draw.draw_movement({"self": {"a_b": measure.movement(maps)}})
    for figure in figures:
        axes = next(a for a in figure.findobj(draw.Axes) if a.get_title())
        assert axes.yaxis_inverted()
        assert all(image.origin == "upper" for image in axes.images)
    for figure in (*figures, moved):
        texts = [x for x in figure.findobj(Text) if x.get_text() in names]
        assert texts or figure in figures[1:]
        assert not any(text.get_usetex() or text.get_parse_math() for text in texts)


@pytest.mark.skipif(shutil.which("latex") is not None, reason="LaTeX is installed")
def test_latex_that_is_missing_is_named(tmp_path, picture):
    out = tmp_path / "maps.png"
    with (
        matplotlib.rc_context({"text.usetex": True}),
        pytest.raises(SystemExit, match="ea_maps: error: .*latex could not be found"),
    ):
        run("image", "ea_vit_tiny", picture, *OPTIONS, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize("family", ["cmr10", "serif"])
def test_fonts_of_matplotlibrc_come_first(recwarn, family):
    """Letters that they lack are taken from other fonts: cmr10 has neither Greek nor Cyrillic."""
    names = ["λόγος", "слово", "ä"]
    maps = [AttentionMap("0", p, p) for p in [probabilities(1, 1, 3, 3)]]
    with matplotlib.rc_context({"font.family": family}):
        fonts = draw.fonts()
        figure = draw.draw_tokens({"ours": maps}, names, names, layers=1, heads=1)
        figure.draw_without_rendering()
    assert fonts[0] == family and "DejaVu Sans" in fonts
    assert len(fonts) == len(set(fonts))
    assert set(fonts[1:]) <= set(matplotlib.font_manager.get_font_names())
    assert not [w for w in recwarn if "missing from font" in str(w.message)]


def test_models_of_different_depth_are_drawn_whole():
    deep = measure.movement([AttentionMap("", p, p) for p in probabilities(9, 1, 2, 4, 4)])
    figure = draw.draw_movement({"self": {"deep": deep, "shallow": deep[:3]}})
    for axes in figure.axes:
        assert axes.get_xlim()[1] > 9
        assert max(max(line.get_xdata(), default=0) for line in axes.lines) == 9


@pytest.mark.parametrize(
    ("options", "row"),
    [({}, 0), ({"global_pool": "avg"}, None), ({"class_token": False, "global_pool": "avg"}, None)],
)
def test_what_is_shown_over_an_image(options, row):
    model = vit(**options)
    picture = Image.fromarray((255 * pixels(40, 40, 3)).byte().numpy())
    look = images.look(model, picture, 32)
    assert look.image.shape == (32, 32, 3) and 0 <= look.image.min() <= look.image.max() <= 1
    prefix = model.num_prefix_tokens
    probs = look.maps[1].attn_probs[0, 2]
    expected = probs[0, prefix:] if row == 0 else probs[prefix:, prefix:].mean(0)
    heat = look.heat_of(look.maps[1], 2)
    torch.testing.assert_close(heat, expected.reshape(4, 4))


@pytest.mark.parametrize("name", ["ea_vit_tiny", "ea_deit_tiny_distilled", "ea_resnet34"])
@pytest.mark.parametrize("size", [32, (32, 64), 40])
def test_an_image_gets_the_size_that_the_model_was_made_for(name, size):
    options = {} if "resnet" in name else {**SMALL, "depth": 2}
    model = images.load(name, **{**options, "img_size": size})
    look = images.look(model, Image.new("L", (50, 40), 200))
    assert look.image.shape == ((*size, 3) if size == (32, 64) else (size, size, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_any_dtype_looks_at_an_image(dtype):
    look = images.look(vit().to(dtype), Image.new("L", (50, 40), 200))
    assert {attention.attn_probs.dtype for attention in look.maps} == {dtype}


def test_figures_of_maps_with_gradients():
    probs = probabilities(1, 2, 3, 3).requires_grad_()
    maps = {"": [AttentionMap("0", probs, probs)]}
    view.TokenView(maps, ["a", "b", "c"], ["a", "b", "c"]).figure()
    view.SeriesView(maps, np.zeros((1, 3))).figure()


def test_a_plain_model_learns_no_mixing():
    """In a comparison it gets the options of the first model."""
    model = images.load("vit_tiny_patch16_224", **SMALL, learnable=True)
    assert not [name for name, _ in model.named_parameters() if ".evolution." in name]


def test_a_model_in_training_is_named():
    with pytest.raises(ValueError, match="must be in evaluation mode: call model.eval"):
        images.look(vit().train(), Image.new("L", (50, 40), 200))


def test_a_model_that_is_not_ours_is_named():
    plain = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    for model in (plain, vit(features_only=True)):
        with pytest.raises(ValueError, match="model must be a classifier of ea_timm, got "):
            images.look(model, Image.new("L", (50, 40), 200))


def test_a_pass_that_fails_leaves_no_hook():
    model = timm.create_model("ea_resnet50", img_size=32, in_chans=1).eval()
    with pytest.raises(RuntimeError):
        images.look(model, Image.new("L", (50, 40), 200))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_names_of_tokens_and_values_of_maps_are_checked():
    with torch.no_grad(), collect_maps(model := vit()) as maps:
        model(pixels(1, 3, 32, 32))
    names = [str(number) for number in range(17)]
    view.TokenView({"ours": maps}, names, names)
    with pytest.raises(ValueError, match="must name 17 and 17 tokens, .* got 17 and 2"):
        view.TokenView({"ours": maps}, names, ["a", "b"])
    maps[1].attn_probs[0, 0, 3] = float("nan")
    with pytest.raises(ValueError, match="ours: the map of layer 2 must be finite, but holds NaN"):
        view.TokenView({"ours": maps}, names, names)


def test_maps_of_several_sentences_or_of_none_are_named():
    with torch.no_grad(), collect_maps(model := vit()) as maps:
        model(pixels(2, 3, 32, 32))
    names = [str(number) for number in range(17)]
    with pytest.raises(ValueError, match="of one sentence, image or series, .* layer 1 is of 2;"):
        view.TokenView({"ours": maps}, names, names)
    with pytest.raises(ValueError, match="ours: there must be maps, but the list is empty"):
        view.TokenView({"ours": []}, names, names)


@pytest.mark.parametrize("number", [0, -1, 1.5, "2", True])
def test_numbers_of_layers_and_heads_are_checked(number):
    found = view.ImageView.of({"ours": images.look(vit(), Image.new("L", (50, 40), 200))})
    message = f"must be a whole number of 1 or more, got {number!r}"
    for name in ("layers", "heads"):
        with pytest.raises(ValueError, match=f"^{name} {message}"):
            found.figure(**{name: number})
        with pytest.raises(ValueError, match=f"^most_{name} {message}"):
            as_page([found], **{f"most_{name}": number})


def test_an_array_in_place_of_an_image_is_named():
    with pytest.raises(ValueError, match="image must be a PIL image, got ndarray; .*fromarray"):
        images.look(vit(), np.zeros((32, 32, 3), np.uint8))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB"])
def test_what_is_transparent_is_white(tmp_path, mode):
    """As in a viewer, whatever the file hides there."""
    options = {}
    if mode in ("P", "RGB"):
        picture = Image.new(mode, (20, 20), 0)
        options["transparency"] = 0 if mode == "P" else (0, 0, 0)
        picture.paste(1 if mode == "P" else (1, 1, 1), (0, 0, 10, 20))
    else:
        picture = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
        picture.paste((0, 0, 0, 255), (0, 0, 10, 20))
        picture = picture.convert("LA") if mode == "LA" else picture
        picture = picture.quantize() if mode == "PA" else picture
    path = tmp_path / "cut_out.png"
    picture.save(path, **options)
    found = images.read(path)
    assert found.getpixel((15, 5)) == (255, 255, 255)
    assert max(found.getpixel((5, 5))) <= 1


DEPTHS = {
    "I;16": lambda x: (x * 65535).astype(np.uint16),
    "12 bits": lambda x: (x * 4095).astype(np.uint16),
    "I": lambda x: (x * (2**24 - 1)).astype(np.int32),
    "F": lambda x: x.astype(np.float32),
    "temperature": lambda x: (300 * x - 100).astype(np.float32),
}


@pytest.mark.parametrize(
    ("depth", "suffix"), [*((x, "tiff") for x in DEPTHS), ("I;16", "png"), ("12 bits", "png")]
)
def test_deep_images_are_scaled_and_not_clipped(tmp_path, depth, suffix):
    grey = np.linspace(0, 1, 256).reshape(16, 16)
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(DEPTHS[depth](grey)).save(path)
    found = np.asarray(images.read(path))
    assert found.shape == (16, 16, 3) and found.dtype == np.uint8
    assert np.abs(found - 255 * grey[..., None]).max() <= 1


def test_numbers_that_are_no_image_are_named(tmp_path, picture):
    path = tmp_path / "nan.tiff"
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(path)
    with pytest.raises(SystemExit, match="must hold finite numbers, but holds NaN or infinity"):
        run("image", "ea_vit_tiny", path, *OPTIONS, "--out", tmp_path / "maps.png")


def test_an_animated_image_shows_its_first_frame_and_says_so(tmp_path, capsys):
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue", "lime")]
    for suffix in ("gif", "png", "webp"):
        path = tmp_path / f"moving.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
        assert images.read(path).getpixel((3, 3)) == (255, 0, 0)
        assert f"moving.{suffix} has 3 frames; the first is shown" in capsys.readouterr().err


def test_an_image_stands_upright(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[274] = 6  # the orientation: turn it to the right
    picture = Image.new("RGB", (40, 20))
    picture.paste("white", (0, 0, 20, 20))
    picture.save(path, exif=exif)
    found = images.read(path)
    assert found.size == (20, 40)
    assert found.getpixel((10, 10)) == (255, 255, 255) and found.getpixel((10, 30)) == (0, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_of_200_megapixels(tmp_path, recwarn, suffix):
    path = tmp_path / f"large.{suffix}"
    large = Image.new("L", (20_000, 10_000), 255)
    large.paste(0, (0, 0, 10_000, 10_000))
    large.save(path)
    found = images.read(path)
    look = images.look(vit(img_size=(32, 64)), found)
    assert abs(look.image[:, :30]).max() < 0.01 and look.image[:, 34:].min() > 0.99
    assert not [w for w in recwarn if "Decompression" in str(w.category)]
    assert Image.MAX_IMAGE_PIXELS is not None  # as it was


def test_an_image_that_is_not_square_or_padded():
    picture = Image.fromarray((255 * pixels(40, 40, 3)).byte().numpy())
    wide = images.look(vit(img_size=(16, 48)), picture, (16, 48))
    assert wide.image.shape == (16, 48, 3) and wide.covers == (16, 48)
    assert wide.heat_of(wide.maps[0], 0).shape == (2, 6)
    model = vit(img_size=33, dynamic_img_size=True, dynamic_img_pad=True)
    padded = images.look(model, picture, 33)
    assert padded.image.shape == (33, 33, 3) and padded.covers == (40, 40)
    assert padded.heat_of(padded.maps[0], 0).shape == (5, 5)


def test_a_plain_vit_is_ours_without_evolution():
    torch.manual_seed(0)
    plain = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    ours = images.load("vit_tiny_patch16_224", **SMALL)
    ours.load_state_dict(plain.state_dict())
    x = pixels(1, 3, 32, 32)
    torch.testing.assert_close(ours(x), plain(x))


def run(*args):
    command_line.main([str(x) for x in args])


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray((255 * pixels(48, 40, 3)).byte().numpy()).save(path)
    return path


OPTIONS = [x for name, value in SMALL.items() for x in ("--option", f"{name}={value}")]


@pytest.mark.parametrize(
    ("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_an_image_on_the_command_line(tmp_path, capsys, picture, suffix, start):
    out = tmp_path / f"maps.{suffix}"
    run(
        "image", "ea_vit_tiny", picture, *OPTIONS, "--compare", "vit_tiny_patch16_224", "--out", out
    )
    for path in (out, tmp_path / f"maps-movement.{suffix}"):
        assert path.read_bytes().startswith(start)
    text = capsys.readouterr().out
    assert "self-attention, evolving" in text and "self-attention, plain" in text
    assert len(re.findall(r"^\| blocks\.\d\.attn \|", text, flags=re.MULTILINE)) == 6


def test_models_are_named_by_what_they_are(tmp_path, picture):
    def names_of(model, *args):
        out = tmp_path / "maps.NPZ"
        run("image", model, picture, *OPTIONS, *args, "--out", out, "--overwrite")
        with np.load(out) as found:
            return list(dict.fromkeys(key.split("/")[0] for key in found if key[-1].isdigit()))

    assert names_of("vit_tiny_patch16_224") == ["plain"]
    assert names_of("ea_vit_tiny") == ["evolving"]
    assert names_of("vit_tiny_patch16_224", "--compare", "ea_vit_tiny") == ["plain", "evolving"]
    both = ["--compare", "ea_deit_tiny"]
    assert names_of("ea_vit_tiny", *both) == ["evolving 1", "evolving 2"]
    plain = [x for name in ("alpha", "beta") for x in ("--option", f"{name}=0")]
    assert names_of("ea_vit_tiny", *plain) == ["plain"]
    assert names_of("ea_vit_tiny", *plain, "--option", "learnable=True") == ["evolving"]
    assert names_of("ea_vit_tiny", *both, "--names", "ViT", "DeiT") == ["ViT", "DeiT"]
    assert names_of("ea_vit_tiny", "--names", "ViT", "DeiT") == ["ViT"]


def test_a_resnet_on_the_command_line(tmp_path, picture):
    resnet = ["image", "ea_resnet50", picture, "--option", "img_size=64"]
    run(*resnet, "--out", tmp_path / "maps.png")
    assert (tmp_path / "maps.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match=r"layer4.0.conv2.attn has maps of 4 x 4"):
        run(*resnet, "--show", "rollout", "--out", tmp_path / "other.png")


def test_rollout_and_flow_on_the_command_line(tmp_path, picture):
    vit = ["image", "ea_vit_tiny", picture, *OPTIONS]
    run(*vit, "--show", "flow", "heads", "rollout", "--out", tmp_path / "maps.png")
    pictures = ["maps-flow.png", "maps-movement.png", "maps-rollout.png", "maps.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*pictures, "picture.png"]
    assert len({(tmp_path / name).read_bytes() for name in pictures}) == 4
    run(*vit, "--show", "rollout", "--out", tmp_path / "maps.npz")
    with np.load(tmp_path / "maps.npz") as found:
        assert found["evolving/self-attention, rollout/002"].shape == (1, 1, 17, 17)
    with pytest.raises(SystemExit, match="maps-rollout.png already exists"):
        run("image", "no model", picture, "--show", "rollout", "--out", tmp_path / "maps.png")


@pytest.mark.slow
def test_a_sentence_on_the_command_line(tmp_path, capsys, data):
    """An evolving and a plain checkpoint of fairseq-train."""
    training = [*TRAINING, "--max-update", 2, "--no-epoch-checkpoints", "--disable-validation"]
    sizes = ["--encoder-layers", 3, "--decoder-layers", 2, "--share-all-embeddings"]
    for arch in ("ea_transformer_tiny", "transformer_tiny"):
        train = ["train", data / "bin", "--user-dir", USER_DIR, "--arch", arch, *sizes, *training]
        fairseq(*train, "--save-dir", tmp_path / arch)
    ours, plain = (
        tmp_path / arch / "checkpoint_last.pt"
        for arch in ("ea_transformer_tiny", "transformer_tiny")
    )
    out = tmp_path / "maps.png"
    run("sentence", ours, "a b c d", "--target", "D C B A", "--compare", plain, "--out", out)
    for part in ("encoder", "decoder", "encoder-decoder", "movement"):
        assert (tmp_path / f"maps-{part}.png").stat().st_size > 5_000
    text = capsys.readouterr().out
    assert len(re.findall(r"encoder\.layers\.\d\.self_attn", text)) == 6
    assert len(re.findall(r"decoder\.layers\.\d\.encoder_attn", text)) == 4

    checkpoint = sentences_.load(ours)
    source = sentences_.encode(checkpoint, "a b c d")
    target = sentences_.encode(checkpoint, "D C B A", target=True)
    axes = sentences_.axes_of(checkpoint, source, target)
    assert axes["encoder-decoder"] == (["</s>", "D", "C", "B", "A"], ["a", "b", "c", "d", "</s>"])
    maps = sentences_.maps_of(checkpoint, source, target)
    assert maps["encoder-decoder"][0].attn_probs.shape[2:] == (5, 5)
    written = sentences_.translate(checkpoint, source)
    assert written.shape[0] == 1 and written[0, -1] == checkpoint.task.target_dictionary.eos()
    # A plain checkpoint becomes our model without evolution, equal to fairseq's.
    from fairseq import checkpoint_utils

    (theirs,), _ = checkpoint_utils.load_model_ensemble([str(plain)])
    lengths = torch.tensor([source.size(1)])
    with torch.no_grad():
        expected = theirs.eval()(source, lengths, target)[0]
        torch.testing.assert_close(
            sentences_.load(plain).model(source, lengths, target)[0], expected
        )
    with pytest.raises(SystemExit, match="none of the tokens of 'q r' is in the dictionary"):
        run("sentence", ours, "q r", "--out", tmp_path / "other.png")

    page = tmp_path / "maps.html"
    run("sentence", ours, "a b c d", "--show", "heads", "rollout", "--out", page)
    for attention in ("encoder", "encoder, rollout", "decoder, rollout", "encoder-decoder"):
        assert f'"attention": "{attention}"' in page.read_text(encoding="utf-8")
    assert "encoder-decoder, rollout" not in page.read_text(encoding="utf-8")

    # No picture is replaced without --overwrite, whichever of the names it has.
    for part in ("encoder", "decoder", "encoder-decoder", "movement"):
        folder = tmp_path / part
        folder.mkdir()
        (folder / f"maps-{part}.png").write_text("theirs")
        with pytest.raises(SystemExit, match=f"maps-{part}.png already exists"):
            run("sentence", ours, "a b", "--out", folder / "maps.png")
        assert [path.read_text() for path in folder.iterdir()] == ["theirs"]
    (folder / "maps.png").write_text("theirs")  # of this name none is written
    run("sentence", ours, "a b", "--out", folder / "maps.png", "--overwrite")
    assert len(list(folder.iterdir())) == 5
    assert (folder / "maps.png").read_text() == "theirs"
    assert (folder / "maps-movement.png").read_bytes().startswith(b"\x89PNG")


def test_roberta_on_the_command_line(tmp_path, capsys, data):
    model = ["--arch", "ea_roberta", "--encoder-layers", 2, "--encoder-embed-dim", 16]
    model += ["--encoder-ffn-embed-dim", 16, "--encoder-attention-heads", 2, "--max-positions", 32]
    text = tmp_path / "text"
    fairseq(
        *("preprocess", "--only-source", "--trainpref", data / "train.de", "--destdir", text),
        *("--validpref", data / "valid.de"),
    )
    fairseq(
        *("train", text, "--user-dir", USER_DIR, "--task", "masked_lm", "--criterion", "masked_lm"),
        *model,
        *("--optimizer", "adam", "--lr", 1e-3, "--batch-size", 8, "--sample-break-mode", "none"),
        *("--cpu", "--max-update", 2, "--disable-validation", "--save-dir", tmp_path / "out"),
        *("--tokens-per-sample", 32, "--num-workers", 0),
    )
    out = tmp_path / "maps.png"
    run("sentence", tmp_path / "out/checkpoint_last.pt", "a b c", "--out", out)
    assert out.stat().st_size > 5_000
    checkpoint = sentences_.load(tmp_path / "out/checkpoint_last.pt")
    source = sentences_.encode(checkpoint, "a b c")
    assert sentences_.axes_of(checkpoint, source, None) == {
        "encoder": (["<s>", "a", "b", "c", "</s>"],) * 2
    }


@pytest.mark.slow
def test_a_series_on_the_command_line(tmp_path, capsys):
    folder = make_dataset(tmp_path, "Made")
    options = {"d_model": 16, "ffn_dim": 16, "num_heads": 2, "attention_dim": 4, "n_epochs": 1}
    from ea_aeon.data import read

    train = read("Made", "train", str(folder))
    estimator = EADCTransformerClassifier(**options, random_state=0)
    estimator.fit(train.series, train.targets).save(tmp_path / "estimator.pt")
    arguments = [*task_of(folder, "Made"), "--arch", "ea_dc_transformer", *NETWORK]
    fairseq("train", *arguments, "--save-dir", tmp_path / "fairseq", "--max-epoch", 1)
    out, page = tmp_path / "maps.png", tmp_path / "maps.html"
    run(
        *("series", tmp_path / "estimator.pt", "Made", "--folder", folder, "--case", 3),
        *("--compare", tmp_path / "fairseq/checkpoint_last.pt", "--out", out),
    )
    assert out.stat().st_size > 10_000
    assert "blocks.1.second.attention" in capsys.readouterr().out
    run("series", tmp_path / "estimator.pt", "Made", "--folder", folder, "--out", page)
    assert '"kind": "series"' in page.read_text(encoding="utf-8")
    several = ["series", tmp_path / "several.pt", "Made", "--folder", folder, "--overwrite"]
    estimator.set_params(n_estimators=2).fit(train.series, train.targets).save(several[1])
    first, second = ([*several, "--member", i, "--out", tmp_path / f"{i}.npz"] for i in (0, 1))
    run(*first)
    run(*second)
    with np.load(tmp_path / "0.npz") as one, np.load(tmp_path / "1.npz") as other:
        assert len(one) == len(other) == 2 + 8
        key = "evolving/self-attention/000"
        assert not np.allclose(one[key], other[key])
    with pytest.raises(SystemExit, match=r"member must lie in \[0, 1\], got 2"):
        run(*several, "--member", 2)
    with pytest.raises(SystemExit, match=r"--case must lie in \[0, 23\], got 24"):
        run("series", tmp_path / "estimator.pt", "Made", "--folder", folder, "--case", 24)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--out", "maps.bmp"], "--out must end in .png, .svg, .pdf, .html, .npz, got maps.bmp"),
        (["--out", "/nowhere/maps.png"], "there is no folder /nowhere to write maps.png to"),
        (["--names", "a", "a"], "--names must differ"),
        (["--compare-option", "depth=3"], "--compare-option need a model: --compare MODEL"),
        (["--compare-checkpoint", "x.pth"], "--compare-option need a model: --compare MODEL"),
    ],
)
def test_bad_options_are_named(tmp_path, monkeypatch, picture, args, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=re.escape(message)):
        run("image", "ea_vit_tiny", picture, *args)


def test_a_number_of_layers_is_checked(picture, capsys):
    with pytest.raises(SystemExit):
        run("image", "ea_vit_tiny", picture, "--layers", 0)
    assert "--layers: must be a whole number of at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["maps.png", "maps-movement.png"])
@pytest.mark.parametrize(
    "door", [["image", "no model", "none.png"], ["series", "none.pt", "BasicMotions"]]
)
def test_no_picture_is_replaced_unasked(tmp_path, monkeypatch, door, name):
    """The error comes before anything is read: there is no such model."""
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("theirs")
    with pytest.raises(SystemExit, match=f"{name} already exists; choose another name, or add"):
        run(*door)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["theirs"]


def test_all_pictures_are_written_or_none(tmp_path, picture, monkeypatch):
    movement = draw.draw_movement
    monkeypatch.setattr(draw, "draw_movement", lambda found: movement({}))
    with pytest.raises(SystemExit):
        run("image", "ea_vit_tiny", picture, *OPTIONS, "--out", tmp_path / "maps.png")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_what_does_not_fit_is_named(tmp_path, picture):
    text = tmp_path / "text.txt"
    text.write_text("no checkpoint")
    ten = tmp_path / "ten.pth"
    torch.save(vit(num_classes=10).state_dict(), ten)
    out = ["--out", tmp_path / "maps.png"]
    for args, message in (
        (["--checkpoint", ten], "--option num_classes=10.*size mismatch"),
        (["--checkpoint", text], "cannot be created with options .* and checkpoint .*text.txt;"),
        (["--checkpoint", tmp_path / "none"], "there is no checkpoint"),
        (["--checkpoint", ten, "--compare", "vit_tiny_patch16_224"], "must be given together"),
        (["--option", "foo=1"], "foo=1"),
        (["--option", "in_chans=1"], "in_chans must be 3, for colour images, got 1"),
        (["--option", "features_only=True"], "must be a classifier"),
    ):
        with pytest.raises(SystemExit, match=f"(?s)ea_maps: error: .*{message}"):
            run("image", "ea_vit_tiny", picture, *OPTIONS, *args, *out)
    with pytest.raises(
        SystemExit, match="text.txt and .*folder must both be files, of fairseq, or"
    ):
        run("sentence", text, "a", "--compare", tmp_path / "folder", *out)
    for door in (["sentence", text, "a"], ["series", text, "BasicMotions"]):
        with pytest.raises(SystemExit, match="checkpoint of fairseq"):
            run(*door, *out)
        door[1] = ten
        with pytest.raises(SystemExit, match="checkpoint of fairseq"):
            run(*door, *out)


def test_bad_files_are_named(tmp_path, picture):
    text = tmp_path / "text.txt"
    text.write_text("no image")
    half = tmp_path / "half.png"
    half.write_bytes(Path(picture).read_bytes()[:-300])
    out = ["--out", tmp_path / "maps.png"]
    for args, message in (
        (["image", "ea_vit_tiny", text], "is not an image"),
        (["image", "ea_vit_tiny", tmp_path / "none.png"], "No such file"),
        (["image", "ea_vit_tiny", half], "half.png is damaged"),
        (["image", "ea_vit_tiny", tmp_path], "error: .*Is a directory"),
        (["image", "efficientnet_b0", picture], "the model must be one of ea_deit_base"),
        (["sentence", tmp_path / "none.pt", "a"], "there is no checkpoint"),
        (["series", tmp_path / "none.pt", "BasicMotions"], "there is no file"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(*args, *out)
