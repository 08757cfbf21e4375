"""Weight files of ``ea_*`` models: their options travel with them, however they are saved."""

import json
import logging

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import load_checkpoint, save_for_hf
from timm.models._manipulate import reinit_non_persistent_buffers
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3

import ea_timm  # noqa: F401 (registers the models)
from evolving_attention import AttentionEvolution

SIZES = {
    "ea_vit_tiny": {"img_size": 32, "depth": 3, "num_classes": 7},
    "ea_deit_tiny_distilled": {"img_size": 32, "depth": 3, "num_classes": 7},
    "ea_resnet50": {"layers": (1, 1, 2, 1), "num_classes": 7},
}
TRAINED = [
    {"alpha": 0.1, "beta": 0.1},
    {"kernel_size": 5},
    {"alpha": 0.3, "beta": 0.0},
    {"alpha": 0.3, "beta": 0.4, "kernel_size": 1, "learnable": True},
]


def create(name, seed=0, **options):
    torch.manual_seed(seed)
    return timm.create_model(name, **{**SIZES[name], **options}).eval()


def trained(name, options):
    """A model with these options; learned numbers differ from layer to layer."""
    model = create(name, seed=1, **options)
    if options.get("learnable"):
        with torch.no_grad():
            for index, evolution in enumerate(evolutions(model)):
                evolution.alpha.fill_(0.6 * index - 0.01)  # the first beyond what it means
                evolution.beta.fill_(1.02 - 0.5 * index)
    return model


def evolutions(model):
    return [module for module in model.modules() if isinstance(module, AttentionEvolution)]


def outputs(model):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(images)


def by_checkpoint_path(name, path, **options):
    return create(name, checkpoint_path=path, **options)


def by_pretrained_file(name, path, **options):
    overlay = {"file": str(path), "num_classes": 7}
    return create(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)


def by_load_checkpoint(name, path, **options):
    model = create(name, **options)
    load_checkpoint(model, path)
    return model


WAYS = [by_checkpoint_path, by_pretrained_file, by_load_checkpoint]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", TRAINED)
@pytest.mark.parametrize("name", SIZES)
def test_what_was_not_given_is_the_files(name, options, way, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    model = trained(name, options)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "last.pth.tar")
    again = way(name, tmp_path / "last.pth.tar")
    assert torch.equal(outputs(again), outputs(model))
    assert "as in the checkpoint" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alpha": 0.9}, "alpha is 0.1 in the checkpoint, but this model was made with alpha=0.9"),
        ({"beta": 0.9}, "beta is 0.2 in the checkpoint, but this model was made with beta=0.9"),
        ({"beta": 0}, "beta is 0.2 in the checkpoint, but this model was made with beta=0"),
        ({"kernel_size": 3}, "kernel_size=5, but this model was made with kernel_size=3"),
    ],
)
def test_what_was_given_must_be_the_files(given, message, way, tmp_path):
    model = create("ea_vit_tiny", alpha=0.1, beta=0.2, kernel_size=5)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(RuntimeError, match=message):
        way("ea_vit_tiny", tmp_path / "weights.pth", **given)
    again = way("ea_vit_tiny", tmp_path / "weights.pth", alpha=0.1, beta=0.2, kernel_size=5)
    assert torch.equal(outputs(again), outputs(model))


@pytest.mark.parametrize("options", TRAINED)
@pytest.mark.parametrize("name", SIZES)
def test_a_saved_model_makes_itself_again(name, options, tmp_path):
    """For a new model, and for one that took its options from a file."""
    model = trained(name, options)
    save_for_hf(model, tmp_path / "made", safe_serialization=True)
    made = timm.create_model(f"local-dir:{tmp_path / 'made'}", pretrained=True)
    assert torch.equal(outputs(made), outputs(model))
    assert [e.learnable for e in evolutions(made)] == [e.learnable for e in evolutions(model)]

    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    adopted = by_checkpoint_path(name, tmp_path / "weights.safetensors")
    save_for_hf(adopted, tmp_path / "adopted", safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'adopted'}", pretrained=True)
    assert torch.equal(outputs(again), outputs(model))
    if not options.get("learnable"):
        with pytest.raises(RuntimeError, match="made with alpha=0.9"):
            timm.create_model(f"local-dir:{tmp_path / 'made'}", pretrained=True, alpha=0.9)


@pytest.mark.parametrize("name", ["ea_vit_tiny", "ea_resnet50"])
def test_one_model_takes_one_file_after_another(name):
    model = create(name)
    for options in (*TRAINED, *reversed(TRAINED)):
        source = trained(name, options)
        model.load_state_dict(source.state_dict())
        assert torch.equal(outputs(model), outputs(source))
        source.load_state_dict(model.state_dict())  # and gives it back


@pytest.mark.parametrize("average", [ModelEma, ModelEmaV2, ModelEmaV3])
def test_moving_averages(average):
    """Rounding changes their numbers slightly, which is no disagreement."""
    model = create("ea_vit_tiny", alpha=0.1, beta=0.7)
    ema = average(model, decay=0.9998)
    for _ in range(100):
        ema.update(model)
    state = (ema.ema if average is ModelEma else ema.module).state_dict()
    for options in ({}, {"alpha": 0.1, "beta": 0.7}):
        again = create("ea_vit_tiny", **options)
        again.load_state_dict(state)
        assert {evolution.mixing for evolution in evolutions(again)} == {(0.1, 0.7)}
        torch.testing.assert_close(outputs(again), outputs(model))


def test_moving_average_in_bfloat16():
    model = create("ea_vit_tiny", alpha=0.1, beta=0.7).bfloat16()
    ema = ModelEmaV3(model, decay=0.9)
    for _ in range(100):
        ema.update(model)
    again = create("ea_vit_tiny")
    again.load_state_dict(ema.module.state_dict())
    assert {evolution.mixing for evolution in evolutions(again)} == {(0.1, 0.7)}


@pytest.mark.parametrize("options", TRAINED)
def test_files_of_scripted_models(options, reload):
    model = trained("ea_vit_tiny", options)
    adopted = create("ea_vit_tiny")
    adopted.load_state_dict(torch.jit.script(model).state_dict())
    assert torch.equal(outputs(adopted), outputs(model))
    torch.testing.assert_close(outputs(reload(torch.jit.script(adopted))), outputs(model))


def test_plain_weights_without_strict_are_reported():
    plain = timm.create_model("vit_tiny_patch16_224", **SIZES["ea_vit_tiny"])
    missing, unexpected = create("ea_vit_tiny").load_state_dict(plain.state_dict(), strict=False)
    fresh = {f"blocks.{i}.attn.evolution.{name}" for i in (1, 2) for name in ("weight", "bias")}
    assert set(missing) == fresh and not unexpected


@pytest.mark.parametrize("name", ["ea_vit_tiny", "ea_resnet50"])
def test_transformers(name, tmp_path):
    """It sets weights one by one, and leaves missing ones uninitialised."""
    transformers = pytest.importorskip("transformers")

    def load():
        return transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path).timm_model

    def leave_out(*names):
        config = json.loads((tmp_path / "config.json").read_text())
        for name in names:
            config["model_args"].pop(name, None)
        (tmp_path / "config.json").write_text(json.dumps(config))

    source = create(name, alpha=0.1, beta=0.2)
    save_for_hf(source, tmp_path, safe_serialization=True)
    leave_out("num_classes", "global_pool")  # which it reads from elsewhere in the file
    assert torch.equal(outputs(load()), outputs(source))
    leave_out("alpha", "beta")
    assert torch.equal(outputs(load()), outputs(source))

    weights = {k: v for k, v in source.state_dict().items() if ".evolution." not in k}
    weights = {k: v for k, v in weights.items() if ".position." not in k}
    save_file(weights, tmp_path / "model.safetensors")
    model = load()
    for evolution in evolutions(model):
        bound = (evolution.num_heads * 9) ** -0.5
        assert bound / 4 < evolution.weight.std() < bound
        assert evolution.alpha == 0.5 and evolution.beta == 1.0
    assert outputs(model).isfinite().all()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    reinit_non_persistent_buffers(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
