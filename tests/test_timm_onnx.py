"""timm's ONNX export, as its onnx_export.py calls it, judged by ONNX Runtime at other sizes."""

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from timm.utils.onnx import onnx_export

import ea_timm  # noqa: F401 (registers the models)

pytestmark = pytest.mark.slow

VIT = {"img_size": 32, "depth": 2, "num_classes": 7}
RESNET = {"layers": (1, 1, 1, 1), "num_classes": 7, "img_size": 64, "zero_init_last": False}
OLD_TORCH = torch.__version__.startswith("2.6.")
TRAINED = [
    {"alpha": 0.1, "beta": 0.1},
    {"alpha": 0.3, "beta": 0.4, "kernel_size": 5, "learnable": True},
]


@pytest.mark.filterwarnings("ignore")  # the exporters' own, of what they keep fixed
@pytest.mark.parametrize("dynamo", [False, True], ids=["legacy", "dynamo"])
@pytest.mark.parametrize("trained", TRAINED, ids=["fixed", "learned"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ea_vit_tiny", VIT),
        ("ea_vit_tiny", {**VIT, "dynamic_img_size": True}),
        ("ea_deit_tiny_distilled", VIT),
        ("ea_resnet50", RESNET),
    ],
    ids=["vit", "vit of any size", "distilled", "resnet"],
)
def test_other_batches_and_sizes(name, options, trained, dynamo, tmp_path):
    """From a checkpoint without its options, for which onnx_export.py has no argument."""
    if dynamo and OLD_TORCH:
        pytest.skip("the new exporter of torch 2.6 fails, for plain models too")
    torch.manual_seed(0)
    model = timm.create_model(name, **options, **trained).eval()
    torch.save(model.state_dict(), tmp_path / "trained.pth")
    again = timm.create_model(name, **options, checkpoint_path=tmp_path / "trained.pth")

    size = options["img_size"]
    # As for timm's plain ViT, the legacy exporter keeps the size of the embedding of positions.
    any_size = name == "ea_resnet50" or ("dynamic_img_size" in options and dynamo)
    onnx_export(
        again,
        str(tmp_path / "model.onnx"),
        input_size=(3, size, size),
        batch_size=2,
        dynamic_size=any_size,
        use_dynamo=dynamo,
        check_forward=True,
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    shapes = [(2, size, size), (5, size, size), (1, size, size)]
    if any_size:
        shapes += [(3, 2 * size, size), (2, size, size + 16), (1, size - 16, size)]
    for batch, height, width in shapes:
        images = torch.randn(batch, 3, height, width)
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        with torch.no_grad():
            expected = model(images).numpy()
        np.testing.assert_allclose(logits, expected, atol=2e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_is_for_other_sizes_too(reload):
    """Also one of images of the size that the tables of positions are made for."""
    torch.manual_seed(0)
    model = timm.create_model("ea_resnet50", **RESNET).eval()
    traced = reload(torch.jit.trace(model, torch.randn(2, 3, 64, 64)))
    for shape in ((2, 3, 64, 64), (3, 3, 96, 64), (1, 3, 32, 48)):
        images = torch.randn(shape)
        torch.testing.assert_close(traced(images), model(images))


@pytest.mark.parametrize("trained", TRAINED, ids=["fixed", "learned"])
@pytest.mark.parametrize(("name", "options"), [("ea_vit_tiny", VIT), ("ea_resnet50", RESNET)])
def test_graphs_suit_other_converters(name, options, trained):
    """OpenVINO does not support lerp, and Core ML has at most five dimensions."""
    model = timm.create_model(name, **options, **trained).eval()
    traced = torch.jit.trace(model, torch.randn(2, 3, options["img_size"], options["img_size"]))
    nodes = list(traced.inlined_graph.nodes())
    tensors = [
        x.type() for node in nodes for x in node.outputs() if x.type().kind() == "TensorType"
    ]
    assert not any("lerp" in node.kind() for node in nodes)
    assert 4 <= max(tensor.dim() for tensor in tensors if tensor.dim() is not None) <= 5
