"""What people do with the parts of a timm model: docs/timm.md, row by row."""

import copy
import pickle
import re

import pytest
import timm
import torch
from timm.models.vision_transformer import Block
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.feature_extraction import create_feature_extractor

from ea_timm.evolved import Evolved

CHANNELS = [256, 512, 1024, 2048]


def images(seed=0):
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def create_resnet(name="ea_resnet50"):
    torch.manual_seed(0)
    options = {"layers": (1, 2, 2, 2), "num_classes": 7, "zero_init_last": False}
    return timm.create_model(name, **options).eval()


def create_vit():
    torch.manual_seed(0)
    return timm.create_model("ea_vit_tiny", img_size=64, depth=4, num_classes=7).eval()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.slow
def test_cutting_the_head():
    """nn.Sequential over the children: the same features and, through the map, gradients."""
    model = create_resnet()
    trunk = nn.Sequential(*list(model.children())[:-2])
    expected = model.forward_features(images())
    assert torch.equal(trunk(images()), expected)
    assert torch.equal(nn.Sequential(*model.children())(images()), model(images()))
    assert torch.equal(torch.fx.symbolic_trace(trunk)(images()), expected)
    torch.testing.assert_close(torch.export.export(trunk, (images(),)).module()(images()), expected)
    if not torch.__version__.startswith("2.6."):  # it cannot compile attributes of tensors
        torch.testing.assert_close(torch.compile(trunk, backend="eager")(images()), expected)

    wanted = gradients(trunk, expected.square().mean())
    got = gradients(trunk, trunk(images()).square().mean())
    assert all(map(torch.equal, got, wanted))
    assert all(grad.abs().sum() > 0 for grad in got)


def test_feature_pyramid():
    model = create_resnet()
    _, features = model.forward_intermediates(images())
    layers = {"layer1": "0", "layer2": "1", "layer3": "2", "layer4": "3"}
    pyramid = BackboneWithFPN(model, layers, CHANNELS, 8).eval()
    assert isinstance(pyramid.body, IntermediateLayerGetter)
    for extract in (pyramid.body, create_feature_extractor(model, layers)):
        got = extract(images())
        assert list(got) == ["0", "1", "2", "3"]
        assert all(map(torch.equal, got.values(), features[1:]))
    assert [tuple(level.shape[1:]) for level in pyramid(images()).values()] == [
        (8, 16, 16),
        (8, 8, 8),
        (8, 4, 4),
        (8, 2, 2),
        (8, 1, 1),
    ]


def test_a_map_that_is_lost_between_stages_is_an_error():
    model = create_resnet()
    features = model.layer2(model.first_stage(model.maxpool(model.stem(images()))))
    with pytest.raises(ValueError, match="did not come with the features"):
        model.layer3(features * 1.0)
    evolved = model.layer3(features, features.attn_logits, with_map=True)
    assert torch.equal(model.layer3(features), evolved.features)
    model.layer3[0].conv2.attn.evolution = None  # the remedy that the message names
    assert not torch.equal(model.layer3[0](features).features, evolved.features)


def hooked(model, part):
    """What hooks on `part`, like Grad-CAM's, will collect: features, then their gradient."""
    seen = []

    def keep(module, args, output):
        assert output.requires_grad
        seen.append(output.detach())
        output.register_hook(seen.append)

    model.get_submodule(part).register_forward_hook(keep)
    return seen


@pytest.mark.parametrize("part", ["layer4", "layer4.1", "layer3.0"])
def test_hooks_of_a_resnet_see_features(part):
    model = create_resnet()
    last = f"{part}.1" if part == "layer4" else part
    got, expected = hooked(model, part), hooked(model, f"{last}.act3")
    model(images())[:, 1].sum().backward()
    assert len(got) == len(expected) == 2
    assert all(map(torch.equal, got, expected))
    assert got[1].abs().sum() > 0


def test_hooks_of_a_vit_see_tokens():
    model = create_vit()
    got = hooked(model, "blocks.2")
    class_tokens, first = [], []
    model.blocks[2].register_forward_hook(lambda *args: class_tokens.append(args[2][:, 0]))
    model.blocks[2].register_forward_hook(lambda *args: first.append(args[2][:1]))
    model(images())[:, 1].sum().backward()
    features = model.forward_intermediates(
        images(), [2], output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )
    ((patches, prefix),) = features
    assert torch.equal(got[0], torch.cat([prefix, patches], dim=1))
    assert torch.equal(first[0], got[0][:1])
    assert torch.equal(class_tokens[0], prefix[:, 0])
    assert got[1].shape == got[0].shape and got[1].abs().sum() > 0


def test_the_pair_is_a_pair_to_python():
    pair = Evolved(torch.ones(2, 3), torch.zeros(1))
    features, attn_logits = pair
    assert pair[0] is features is pair.features and pair[-1] is attn_logits
    assert pair.shape == (2, 3) and torch.equal(pair[:, 1], torch.ones(2))
    for copied in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert isinstance(copied, Evolved) and torch.equal(copied.features, features)
    with pytest.raises(AttributeError, match="no_such"):
        _ = pair.no_such


@pytest.mark.parametrize("name", ["ea_resnet34", "ea_resnet50"])
def test_modules_run_in_timms_order(name):
    """FullGrad and the like pair what hooks see with the order in which modules are registered."""

    def order(model):
        names = []
        for name, module in model.named_modules():
            if not list(module.children()):
                module.register_forward_hook(lambda *_, name=name: names.append(name))
        model(images())
        return names

    model = create_resnet(name)
    ran = order(model)
    others = [re.sub(r"(conv\d).conv$", r"\1", path) for path in ran if ".attn." not in path]
    assert others == order(create_resnet(name.removeprefix("ea_")))
    of_attention = [path for path in ran if ".attn." in path]
    assert of_attention == [path for path, _ in model.named_modules() if path in of_attention]


def test_blocks_called_with_tokens():
    """Masked autoencoders, prompts, token droppers: as the blocks one by one."""
    model = create_vit()
    tokens = model.embed(images())
    assert torch.equal(model.norm(model.blocks(tokens)), model.forward_features(images()))
    kept = tokens[:, [0, 3, 4, 9, 16]]
    x, attn_logits = kept, None
    for block in model.blocks:
        x, attn_logits = block(x, attn_logits)
    assert torch.equal(model.blocks(kept), x)
    first, attn_logits = model.blocks[0](kept)
    model.blocks[1].attn.evolution = model.blocks[0].attn.evolution  # none: a plain start
    assert model.blocks[1:](first).shape == kept.shape


class PatchedBlock(Block):
    """As ToMe patches blocks, by their class."""

    def forward(self, x):
        return x + self.attn(self.norm1(x))


class FeaturesOnly(nn.Module):
    """As wrappers that were written for timm's blocks."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, *args):
        return self.block(x, *args)[0]


def patch(model):
    for block in model.blocks:
        block.__class__ = PatchedBlock


def replace(model):
    model.blocks[2] = Block(192, 3)


def wrap(model):
    model.blocks[2] = FeaturesOnly(model.blocks[2])


@pytest.mark.parametrize("change", [patch, replace, wrap])
def test_blocks_that_hand_no_map_on(change):
    model = create_vit()
    change(model)
    for run in (model, model.forward_intermediates):
        with pytest.raises(TypeError, match="takes no attention map or returns none.*docs/timm.md"):
            run(images())


def test_blocks_called_as_timms():
    model, resnet = create_vit(), create_resnet()
    tokens = model.embed(images())
    features = resnet.first_stage(resnet.maxpool(resnet.stem(images())))
    with pytest.raises(TypeError, match=r"x, attn_logits = block\(x, attn_logits\)"):
        for block in model.blocks:
            tokens = block(tokens)
    with pytest.raises(TypeError, match=r"model.blocks\(x\). of a ViT"):
        nn.Sequential(*model.blocks)(model.embed(images()))
    with pytest.raises(TypeError, match=r"model.layer3\(x\). of a ResNet"):
        nn.Sequential(*resnet.layer2)(features)
    with pytest.raises(TypeError, match="got features and attention map as one"):
        resnet.layer3(resnet.layer2(features, with_map=True))
    for late in (model.blocks[2:], model.blocks[3]):
        with pytest.raises(ValueError, match="evolution = None"):
            late(model.embed(images()))
    del model.blocks[0]
    with pytest.raises(ValueError, match="evolution = None"):
        model(images())
