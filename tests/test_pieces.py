"""Large maps without gradients: attention for a part of the batch at a time changes nothing."""

import pytest
import timm
import torch

import ea_timm  # noqa: F401 (registers the models)
from ea_aeon.network import DCTransformer, EvolvingSelfAttention
from ea_timm.attention2d import EvolvingAttention2d
from ea_timm.layers import EvolvingAttention
from evolving_attention import collect_maps, pieces

BATCH = 5


def vit(**options):
    return timm.create_model(
        "ea_vit_tiny_patch16_224", img_size=64, depth=3, num_classes=7, **options
    )


def resnet():
    return timm.create_model("ea_resnet50", img_size=64, num_classes=7)


def images():
    return torch.randn(BATCH, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def one_by_one(monkeypatch):
    """Treats every map as large; notes the sizes of batch with which attention is computed."""
    monkeypatch.setattr(pieces, "LARGE", 1)
    monkeypatch.setattr(pieces, "CELLS", 1)
    sizes = set()
    for attention in (EvolvingAttention, EvolvingAttention2d, EvolvingSelfAttention):

        def noting(self, q, k, v, prev_attn_logits, *others, attend=attention.attend):
            sizes.update(len(x) for x in (q, k, v, prev_attn_logits) if x is not None)
            return attend(self, q, k, v, prev_attn_logits, *others)

        monkeypatch.setattr(attention, "attend", noting)
    return sizes


@pytest.mark.parametrize("make", [vit, resnet])
def test_image_models(make, one_by_one):
    model = make().eval()
    expected = model(images())
    assert one_by_one == {BATCH}  # with gradients the batch stays together
    one_by_one.clear()
    with torch.no_grad():
        torch.testing.assert_close(model(images()), expected, atol=1e-5, rtol=1e-4)
    assert one_by_one == {1}


@pytest.mark.parametrize(
    "arguments",
    [
        {"is_causal": True},
        {"attn_mask": torch.rand(17, 17, generator=torch.Generator().manual_seed(2)) > 0.2},
        {
            "attn_mask": torch.rand(BATCH, 1, 1, 17, generator=torch.Generator().manual_seed(3))
            > 0.2
        },
        {"attn_mask": torch.zeros(1, 1, 17, 17).index_fill(3, torch.tensor([4]), float("-inf"))},
    ],
    ids=["causal", "pairs", "tokens", "added"],
)
def test_masks(arguments, one_by_one):
    model = vit().eval()
    expected = model.forward_features(images(), **arguments)
    one_by_one.clear()
    with torch.no_grad():
        got = model.forward_features(images(), **arguments)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert one_by_one == {1}


@pytest.mark.parametrize("causal", [False, True])
def test_series_of_different_lengths(causal, one_by_one):
    model = DCTransformer(3, 2, num_heads=4, num_blocks=3, causal=causal).eval()
    x = torch.randn(BATCH, 19, 3, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([19, 7, 12, 3, 18])
    expected = model(x, lengths)
    one_by_one.clear()
    with torch.no_grad():
        torch.testing.assert_close(model(x, lengths), expected, atol=1e-5, rtol=1e-4)
    assert one_by_one == {1}


@pytest.mark.parametrize("wrong", [1, 2])
def test_a_map_or_mask_of_another_batch_is_refused(wrong, one_by_one):
    attention = vit().eval().blocks[1].attn
    tokens, maps = torch.randn(4, 17, 192), torch.randn(4, 3, 17, 17)
    with torch.no_grad():
        with pytest.raises(ValueError, match="prev_attn_logits has shape .*attn_logits.*4, 3, 17"):
            attention(tokens, maps[:wrong])
        one_by_one.clear()
        attention(tokens, maps, attn_mask=torch.ones(1, 1, 1, 17, dtype=torch.bool))
        assert one_by_one == {1}
        for count in (wrong + 1, 5):
            with pytest.raises(ValueError, match="attn_mask must be broadcastable"):
                attention(tokens, maps, attn_mask=torch.ones(count, 1, 1, 17, dtype=torch.bool))


def test_a_hook_sees_the_whole_batch(one_by_one):
    model = vit().eval()
    seen = []

    def see(module, args, result):
        if type(module) is torch.nn.Dropout:
            seen.append(len(result))

    with torch.no_grad():
        with collect_maps(model) as maps:
            model(images())
        assert [len(attn_probs) for _, _, attn_probs in maps] == [BATCH] * 3
        with torch.nn.modules.module.register_module_forward_hook(see):
            model(images())
        assert set(seen) == {BATCH} == one_by_one
        one_by_one.clear()
        model.blocks[1].attn.attn_drop.register_forward_hook(see)
        model(images())
        assert set(seen) == {BATCH}
        assert one_by_one == {1, BATCH}  # the other blocks have no hook


def test_a_hook_before_sees_the_whole_batch(one_by_one):
    model = vit().eval()
    seen = []

    def see(module, args):
        if type(module) is torch.nn.Dropout and isinstance(args[0], torch.Tensor):
            seen.append(len(args[0]))

    with torch.no_grad():
        with torch.nn.modules.module.register_module_forward_pre_hook(see):
            model(images())
        for block in model.blocks:
            block.attn.attn_drop.register_forward_pre_hook(see)
        model(images())
    assert set(seen) == {BATCH} == one_by_one


def test_a_mask_of_as_many_heads_as_examples(one_by_one):
    model = vit().eval()
    mask = torch.rand(3, 17, 17, generator=torch.Generator().manual_seed(2)) > 0.2
    expected = model.forward_features(images()[:3], attn_mask=mask)
    with torch.no_grad():
        got = model.forward_features(images()[:3], attn_mask=mask)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_under_vmap(one_by_one):
    model = vit().eval()
    expected = model(images())
    one_by_one.clear()
    with torch.no_grad():
        got = torch.func.vmap(model)(images().unsqueeze(0))
    torch.testing.assert_close(got[0], expected, atol=1e-5, rtol=1e-4)
    assert one_by_one == {BATCH}


def test_a_hook_on_the_whole_attention_costs_nothing(one_by_one):
    model = vit().eval()
    shapes = []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda _, args, result: shapes.append(result[1].shape))
    with torch.no_grad():
        model(images())
    assert shapes == [(BATCH, 3, 17, 17)] * 3
    assert one_by_one == {1}


def test_really_large_maps():
    model = vit(embed_dim=48, num_heads=12).eval()
    batch = pieces.LARGE // (4 * 12 * 17**2) + 3  # not a multiple of the pieces
    x = torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    sizes = []
    with torch.no_grad():
        got = model(x)
        for block in model.blocks:
            block.attn.probe.register_forward_hook(
                lambda _, args, result: sizes.append(len(result))
            )
        expected = model(x)
    assert sizes == [batch] * 3
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_maps_that_are_large_one_by_one_stay_together(one_by_one, monkeypatch):
    monkeypatch.setattr(pieces, "MAPPED", 4 * 3 * 17**2)
    with torch.no_grad():
        vit().eval()(images())
    assert one_by_one == {BATCH}


def test_half_precision(one_by_one):
    model = vit().eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(images())
        assert one_by_one == {1}
        for block in model.blocks:
            block.attn.probe.register_forward_hook(lambda *args: None)
        expected = model(images())
    assert one_by_one == {1, BATCH}
    torch.testing.assert_close(got, expected, atol=0.05, rtol=0.05)
