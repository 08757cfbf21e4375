"""Large maps without gradients: attention for a part of the batch at a time changes nothing."""

from collections import Counter

import pytest
import timm
import torch

import ea_timm  # noqa: F401 (registers the models)
from ea_aeon.network import DCTransformer
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
    """Treats every map as large; counts how many examples each attention gets at a time."""
    monkeypatch.setattr(pieces, "LARGE", 1)
    monkeypatch.setattr(pieces, "CELLS", 1)
    sizes = Counter()
    part = pieces._part

    def counting(arg, piece, batch):
        result = part(arg, piece, batch)
        if isinstance(arg, torch.Tensor):
            sizes[len(result)] += 1
        return result

    monkeypatch.setattr(pieces, "_part", counting)
    return sizes


@pytest.mark.parametrize("make", [vit, resnet])
def test_image_models(make, one_by_one):
    model = make().eval()
    expected = model(images())
    assert not one_by_one  # with gradients the batch stays together
    with torch.no_grad():
        torch.testing.assert_close(model(images()), expected, atol=1e-5, rtol=1e-4)
    assert set(one_by_one) == {1}


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
    with torch.no_grad():
        got = model.forward_features(images(), **arguments)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert 1 in one_by_one


@pytest.mark.parametrize("causal", [False, True])
def test_series_of_different_lengths(causal, one_by_one):
    model = DCTransformer(3, 2, num_heads=4, num_blocks=3, causal=causal).eval()
    x = torch.randn(BATCH, 19, 3, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([19, 7, 12, 3, 18])
    expected = model(x, lengths)
    with torch.no_grad():
        torch.testing.assert_close(model(x, lengths), expected, atol=1e-5, rtol=1e-4)
    assert 1 in one_by_one


def test_a_hook_sees_the_whole_batch(one_by_one):
    model = vit().eval()
    seen = []
    model.blocks[1].attn.attn_drop.register_forward_hook(
        lambda module, args, result: seen.append(len(result))
    )
    with torch.no_grad():
        model(images())
        with collect_maps(model) as maps:
            model(images())
    assert seen == [BATCH, BATCH]
    assert [len(attn_probs) for _, _, attn_probs in maps] == [BATCH] * 3


def test_really_large_maps():
    model = vit(embed_dim=48, num_heads=12).eval()
    batch = pieces.LARGE // (4 * 12 * 17**2) + 3  # not a multiple of the pieces
    x = torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    sizes = []
    with torch.no_grad():
        got = model(x)
        for block in model.blocks:  # a hook keeps the batch together
            block.attn.register_forward_hook(lambda _, args, result: sizes.append(result[1].shape))
        expected = model(x)
    assert sizes == [(batch, 12, 17, 17)] * 3
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_half_precision(one_by_one):
    model = vit().eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(images())
        one_by_one.clear()
        for block in model.blocks:
            block.attn.register_forward_hook(lambda *args: None)
        expected = model(images())
    assert not one_by_one
    torch.testing.assert_close(got, expected, atol=0.05, rtol=0.05)
