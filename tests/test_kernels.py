"""The Triton kernels against the paper's equations, in Triton's interpreter.

On a machine with a GPU, `TRITON_INTERPRET=0 pytest tests/test_kernels.py` compiles and runs them.
"""

import os
import subprocess
import sys

import pytest
import torch

from evolving_attention import WINDOWS, reference

INTERPRET = os.environ.get("TRITON_INTERPRET", "0" if "triton" in sys.modules else "1")
with pytest.MonkeyPatch.context() as patch:
    # Read when triton is imported and again later; other tests and their processes never see it.
    patch.setenv("TRITON_INTERPRET", INTERPRET)
    from evolving_attention import kernels

if kernels.triton is None:
    pytest.skip("no triton, or one older than 3.3", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() and not kernels.INTERPRETED else "cpu"
RUNNABLE = kernels.INTERPRETED or DEVICE == "cuda"
runs_kernels = pytest.mark.skipif(not RUNNABLE, reason="runs in a process of its own, see below")
ALPHA, BETA = 0.25, 0.375


@pytest.fixture(autouse=True)
def switched_on(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", INTERPRET)
    monkeypatch.setenv("EVOLVING_ATTENTION_TRITON", "1")


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def draw_mask(*shape, seed):
    return draw(*shape, seed=seed) > 0.5


def tensors(batch=2, heads=3, queries=5, keys=17, kernel_size=3, dtype=torch.float32):
    """Logits, the map before, weight and bias."""
    shape = (batch, heads, queries, keys)
    return [
        draw(*shape, seed=1, dtype=dtype).requires_grad_(),
        draw(*shape, seed=2, dtype=dtype).requires_grad_(),
        draw(heads, heads, kernel_size, kernel_size, seed=3, dtype=dtype).requires_grad_(),
        draw(heads, seed=4, dtype=dtype).requires_grad_(),
    ]


def equations(attn_logits, prev, weight, bias, window="bidirectional", mask=None, hidden=None):
    """A and P by the reference; rows hidden throughout have probabilities 0, not NaN."""
    evolved = reference.evolve(attn_logits, prev, weight, bias, ALPHA, BETA, window, mask)
    if hidden is None:
        return evolved, evolved.softmax(-1)
    nothing = hidden.all(-1, keepdim=True)
    probs = evolved.masked_fill(hidden & ~nothing, float("-inf")).softmax(-1)
    return evolved, probs.masked_fill(nothing, 0)


def by_kernels(output):
    return type(output.grad_fn).__name__ == "_AttendBackward"


def assert_equal_with_gradients(inputs, *options, tolerance=1e-5, kept=None, **named):
    """attend == equations (in float64) in both outputs and, through both, in every gradient."""
    outputs = kernels.attend(*inputs, ALPHA, BETA, *options, **named)
    assert all(by_kernels(x) for x in outputs)
    assert all(x.dtype == inputs[0].dtype for x in outputs)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    expected = equations(*exact_inputs, *options)
    if kept is not None:
        expected = (expected[0], expected[1] * kept / (1 - named["dropout"]))
    upstream = [draw(*x.shape, seed=5 + i, dtype=x.dtype) for i, x in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, inputs, upstream)
    expected_grads = torch.autograd.grad(expected, exact_inputs, [x.double() for x in upstream])
    for got, exact in zip([*outputs, *grads], [*expected, *expected_grads], strict=True):
        scale = exact.abs().max().item()
        torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance * scale)


@runs_kernels
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("window", WINDOWS)
def test_equals_the_equations_in_value_and_every_gradient(window, kernel_size):
    mask, hidden = draw_mask(2, 1, 5, 17, seed=7), draw_mask(2, 1, 5, 17, seed=8)
    hidden[1, 0, 3] = True
    assert_equal_with_gradients(tensors(kernel_size=kernel_size), window, mask, hidden)


@runs_kernels
@pytest.mark.parametrize("window", WINDOWS)
def test_without_masks_on_one_cell_and_on_several_tiles(window):
    assert_equal_with_gradients(tensors(1, 1, 1, 1), window)
    assert_equal_with_gradients(tensors(1, 3, 9, 33), window)


@runs_kernels
@pytest.mark.parametrize("heads", [1, 4, 6, 16])
def test_heads(heads):
    assert_equal_with_gradients(tensors(1, heads))


@runs_kernels
@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3, 5, 17), (2, 3, 5, 17)),
        ((2, 1, 1, 17), (2, 1, 1, 17)),  # padding
        ((2, 1, 5, 1), (5, 17)),
        ((), (3, 1, 17)),
    ],
)
def test_masks_of_every_shape(shapes):
    masks = [draw_mask(*shape, seed=9 + i) for i, shape in enumerate(shapes)]
    assert_equal_with_gradients(tensors(kernel_size=1), "cross", *masks)


@runs_kernels
def test_future():
    future = torch.ones(17, 17, dtype=torch.bool, device=DEVICE).triu(1)
    assert_equal_with_gradients(tensors(keys=17, queries=17, batch=1), "causal", future, future)


@runs_kernels
@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "tolerance"),
    [
        (torch.float16, torch.float16, 4e-3),
        (torch.float16, torch.float32, 4e-3),
        (torch.bfloat16, torch.bfloat16, 4e-2),  # the interpreter rounds towards 0
        (torch.bfloat16, torch.float32, 4e-2),  # as under autocast
    ],
)
def test_half_precision(dtype, weight_dtype, tolerance):
    inputs = tensors(dtype=dtype)
    inputs[2:] = [x.detach().to(weight_dtype).requires_grad_() for x in inputs[2:]]
    hidden = draw_mask(2, 1, 5, 17, seed=8)
    assert_equal_with_gradients(inputs, "cross", hidden, hidden, tolerance=tolerance)


@runs_kernels
def test_not_contiguous():
    def turned(x):
        return x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()

    inputs = [turned(x) for x in tensors()[:3]] + [draw(6)[::2].requires_grad_()]
    assert not any(x.is_contiguous() for x in inputs)
    mask = draw_mask(17, 5, 1, 2, seed=7).permute(3, 2, 1, 0)
    assert_equal_with_gradients(inputs, "bidirectional", mask, mask)
    expanded = torch.ones((), device=DEVICE).expand(inputs[0].shape)
    grads, expected_grads = (
        torch.autograd.grad(outputs, inputs, [expanded, expanded])
        for outputs in (kernels.attend(*inputs, ALPHA, BETA), equations(*inputs))
    )
    torch.testing.assert_close(grads, expected_grads, rtol=1e-5, atol=1e-4)


@runs_kernels
@pytest.mark.parametrize("index", [0, 1])
def test_gradient_through_one_output(index):
    inputs = tensors()
    out = kernels.attend(*inputs, ALPHA, BETA)[index]
    expected = equations(*inputs)[index]
    upstream = draw(*out.shape, seed=5)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    )


@runs_kernels
def test_gradient_of_some_inputs():
    logits, prev, weight, bias = (x.detach() for x in tensors())
    prev.requires_grad_()
    out, probs = kernels.attend(logits, prev, weight, bias, ALPHA, BETA)
    expected = equations(logits, prev, weight, bias)
    upstream = draw(*out.shape, seed=5)
    (grad,) = torch.autograd.grad([out, probs], prev, [upstream] * 2)
    (expected_grad,) = torch.autograd.grad(expected, prev, [upstream] * 2)
    torch.testing.assert_close(grad, expected_grad)


@runs_kernels
def test_rows_longer_than_a_block_of_columns():
    inputs = [x.detach() for x in tensors(1, 1, 2, 2 * kernels.ROW_CELLS + 9, kernel_size=1)]
    inputs[0][..., -9:] += 5  # the greatest come last
    hidden = torch.zeros(2, inputs[0].size(-1), dtype=torch.bool, device=DEVICE)
    hidden[0, : kernels.ROW_CELLS + 1] = True  # a first block without any
    outputs = kernels.attend(*inputs, ALPHA, BETA, hidden=hidden)
    torch.testing.assert_close(outputs, equations(*inputs, hidden=hidden))


@runs_kernels
@pytest.mark.parametrize(("alpha", "beta"), [(0, 1), (1, 0)])
def test_alpha_and_beta_at_their_ends(alpha, beta):
    inputs = tensors(1, kernel_size=1)
    outputs = kernels.attend(*inputs, alpha, beta)
    expected = kernels.attend_eager(*inputs, alpha, beta)
    assert by_kernels(outputs[0])
    torch.testing.assert_close(outputs, expected)
    upstream = [draw(*x.shape, seed=5) for x in outputs]
    torch.testing.assert_close(
        torch.autograd.grad(outputs, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream, materialize_grads=True),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.skipif(not kernels.INTERPRETED, reason="the interpreter alone takes closures")
def test_offsets_beyond_32_bits():
    tl, size = kernels.tl, (16, 40000, 40001)
    heads, queries, keys = size
    across, down = -(-keys // kernels.BLOCK_S), -(-queries // kernels.BLOCK_T)
    offsets = torch.empty(kernels.LANES, kernels.CELLS, dtype=torch.int64)

    @kernels.triton.jit
    def kernel(offsets, tile, size):
        batch, t, s = kernels._tile(tile, size)
        _, cell, _ = kernels._tile_cells(batch, t, s, size)
        out = tl.arange(0, kernels.LANES)[:, None] * kernels.CELLS + tl.arange(0, kernels.CELLS)
        tl.store(offsets + out, cell)

    batch, row, column = 2, 1234, 77
    kernel[(1,)](offsets, (batch * down + row) * across + column, size)
    head = torch.arange(heads).view(-1, 1, 1)
    t = row * kernels.BLOCK_T + torch.arange(kernels.BLOCK_T).view(-1, 1)
    s = column * kernels.BLOCK_S + torch.arange(kernels.BLOCK_S)
    expected = ((batch * heads + head) * queries + t) * keys + s
    assert torch.equal(offsets, expected.view(offsets.shape))
    assert offsets.min() > 2**31


@runs_kernels
def test_large_logits():
    inputs = tensors(1, 1, 5, 17, 1)
    inputs[0] = (inputs[0].detach() * 1e4).requires_grad_()
    assert_equal_with_gradients(inputs)


@runs_kernels
def test_gradients_of_dropout_are_those_of_the_same_cells():
    inputs, hidden = tensors(), draw_mask(2, 1, 5, 17, seed=8)
    probs = kernels.attend(*inputs, ALPHA, BETA, hidden=hidden, dropout=0.25, seed=11)[1]
    assert_equal_with_gradients(
        inputs, "bidirectional", None, hidden, kept=probs > 0, dropout=0.25, seed=11
    )


@runs_kernels
def test_weight_gradient_of_more_tiles_than_programs(monkeypatch):
    monkeypatch.setattr(kernels, "WEIGHT_PROGRAMS", 2 * 9)
    inputs = tensors(2, 3, 17, 5)
    assert_equal_with_gradients(inputs, "causal")


if not RUNNABLE:

    def test_in_a_process_of_its_own():
        """Another test imported triton first, without its interpreter."""
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        subprocess.run([sys.executable, "-m", "pytest", __file__], check=True, env=environment)


def test_compiles_for_a_gpu(tmp_path):
    """What the interpreter does not see, types above all; on machines without a GPU, too."""
    program = """
import torch, triton
from triton.backends.compiler import GPUTarget

class H200:
    get_current_device = get_current_stream = lambda self, device=0: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(H200())
compiled = {}

def warmup(self, grid):
    def launch(*args, **options):
        compiled[self.__name__] = self.warmup(*args, grid=grid, **options)
    return launch

triton.JITFunction.__getitem__ = warmup
from evolving_attention import kernels

def compile_all(heads, queries, keys, dtype, weight_dtype, dropout, *masks):
    maps = [torch.zeros(2, heads, queries, keys, dtype=dtype) for _ in range(2)]
    weights = [torch.zeros(heads, heads, 3, 3), torch.zeros(heads)]
    inputs = [x.requires_grad_() for x in maps + [x.to(weight_dtype) for x in weights]]
    masks = masks or (None, None)
    outputs = kernels._Attend.apply(*inputs, 0.1, 0.2, "causal", *masks, dropout, 123)
    torch.autograd.grad(outputs, inputs, maps)

future = torch.ones(96, 96).triu(1).bool()
compile_all(8, 96, 96, torch.bfloat16, torch.bfloat16, 0.1, future, future)
compile_all(1, 1, 1, torch.float16, torch.float32, 0.0)
assert len(compiled) == 7 and all(kernel.asm["cubin"] for kernel in compiled.values())
"""
    if "nvidia" not in kernels.triton.backends.backends:
        pytest.skip("this triton does not compile for NVIDIA's GPUs")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_a_vit_uses_them_where_asked():
    program = """
import os, timm, torch, ea_timm
from evolving_attention import kernels

options = dict(img_size=32, patch_size=8, depth=3, embed_dim=24, num_heads=3)
model = timm.create_model("ea_vit_tiny", alpha=0.3, beta=0.4, **options)
x, results = torch.randn(2, 3, 32, 32), []
for switch, calls in (("1", 2), ("0", 0)):
    os.environ["EVOLVING_ATTENTION_TRITON"] = switch
    y = model(x)
    gradients = torch.autograd.grad(y.square().sum(), model.parameters())
    names, nodes = set(), [y.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in names:
            names.add(node)
            nodes += [below for below, _ in node.next_functions]
    assert sum(type(node).__name__ == "_AttendBackward" for node in names) == calls
    results.append([y, *gradients])
for kernel, eager in zip(*results, strict=True):
    torch.testing.assert_close(kernel, eager, atol=1e-4, rtol=1e-4)
torch.testing.assert_close(torch.jit.script(model)(x), y)
os.environ["EVOLVING_ATTENTION_TRITON"] = "1"
model.blocks[1](torch.randn(2, 5, 24))  # no map came: plain attention
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "EVOLVING_ATTENTION_TRITON": "1"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


BOTH = [pytest.param(kernels.attend, marks=runs_kernels), kernels.attend_eager]


@pytest.mark.parametrize("function", BOTH)
def test_dropout_is_of_its_seed_alone(function):
    inputs = tensors(1, kernel_size=1)

    def run(seed):
        outputs = function(*inputs, ALPHA, BETA, dropout=0.5, seed=seed)
        return [*outputs, *torch.autograd.grad(outputs[1].square().sum(), inputs)]

    first, second, other = run(3), run(3), run(4)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert not torch.equal(first[1], other[1])
    torch.manual_seed(0)
    first, second = run(None), run(None)
    torch.manual_seed(0)
    assert torch.equal(first[1], run(None)[1])
    assert not torch.equal(first[1], second[1])


@pytest.mark.parametrize("function", BOTH)
def test_dropout_keeps_the_mean(function):
    inputs = [x.detach() for x in tensors(2, 4, 16, 32, 1)]
    dropped = function(*inputs, ALPHA, BETA, dropout=0.25, seed=11)[1]
    probs = equations(*inputs)[1]
    kept = dropped > 0
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(dropped[kept], probs[kept] / 0.75)
    assert dropped.sum(-1).mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("masked", [False, True])
def test_eager_equals_the_equations(window, masked):
    inputs = tensors(dtype=torch.float64)
    masks = [draw_mask(2, 1, 5, 17, seed=7), draw_mask(2, 1, 5, 17, seed=8)] if masked else []
    if masked:
        masks[1][1, 0, 3] = True
    outputs = kernels.attend_eager(*inputs, ALPHA, BETA, window, *masks)
    expected = equations(*inputs, window, *masks)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-12)
    upstream = [draw(*x.shape, seed=5 + i, dtype=x.dtype) for i, x in enumerate(outputs)]
    torch.testing.assert_close(
        torch.autograd.grad(outputs, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        rtol=1e-9,
        atol=1e-10,
    )


def assert_falls_back(inputs, alpha=ALPHA, beta=BETA):
    outputs = kernels.attend(*inputs, alpha, beta)
    assert not any(by_kernels(x) for x in outputs)
    assert all(
        torch.equal(x, y)
        for x, y in zip(outputs, kernels.attend_eager(*inputs, alpha, beta), strict=True)
    )


def test_falls_back_on_what_the_kernels_cannot_do():
    assert_falls_back(tensors(dtype=torch.float64))
    assert_falls_back(tensors(heads=17))
    assert_falls_back(tensors(kernel_size=7))
    assert_falls_back(tensors(batch=0))
    assert_falls_back([*tensors()[:2], None, None])
    learned = torch.tensor([0.25], device=DEVICE, requires_grad=True)
    assert_falls_back(tensors(), alpha=learned)
    assert_falls_back(tensors(), beta=learned)


@pytest.mark.parametrize("value", [None, "", "0"])
def test_off_by_default(monkeypatch, value):
    if value is None:
        monkeypatch.delenv("EVOLVING_ATTENTION_TRITON")
    else:
        monkeypatch.setenv("EVOLVING_ATTENTION_TRITON", value)
    assert_falls_back(tensors())


@pytest.mark.skipif(not kernels.INTERPRETED, reason="CPU")
def test_the_cpu_is_supported_in_the_interpreter_alone(monkeypatch):
    logits, _, weight, bias = tensors()
    assert kernels.supported(logits, weight, bias, ALPHA, BETA)
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    assert not kernels.supported(logits, weight, bias, ALPHA, BETA)


def test_without_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch
from evolving_attention import kernels
x = torch.randn(1, 2, 3, 4)
evolved, probs = kernels.attend(x, x, torch.randn(2, 2, 3, 3), torch.randn(2), 0.5, 0.5)
assert torch.allclose(probs, evolved.softmax(-1))
"""
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ)


@pytest.mark.parametrize("switch", ["0", "1"])
def test_bad_arguments(monkeypatch, switch):
    monkeypatch.setenv("EVOLVING_ATTENTION_TRITON", switch)
    logits, prev, weight, bias = tensors()

    def refused(message, *tensors, alpha=ALPHA, beta=BETA, **options):
        with pytest.raises(ValueError, match=message):
            kernels.attend(*tensors, alpha, beta, **options)

    good = (logits, prev, weight, bias)
    refused("attn_logits must be", logits[0], prev[0], weight, bias)
    refused("prev_attn_logits has shape", logits, prev[..., 1:], weight, bias)
    refused("prev_attn_logits has dtype", logits, prev.half(), weight, bias)
    refused("weight and bias must both be given", logits, prev, weight, None)
    refused("weight and bias must both be given", logits, prev, None, bias)
    refused("weight must be .* 3 heads", logits, prev, weight[:2], bias)
    refused("weight must be .* 3 heads", logits, prev, weight[..., :1], bias)
    refused("bias .* for 3 heads", logits, prev, weight, bias[:2])
    refused("kernel_size must be odd", logits, prev, weight[..., :2, :2], bias)
    refused(r"alpha must lie in \[0, 1\], got 2", *good, alpha=2)
    refused(r"beta must lie in \[0, 1\], got -1", *good, beta=-1)
    refused("window must be one of .* got 'round'", *good, window="round")
    refused("mask must be of dtype torch.bool", *good, mask=logits)
    refused("hidden must be of dtype torch.bool", *good, hidden=logits)
    refused("mask must be broadcastable", *good, mask=logits[..., :3] > 0)
    refused("hidden must be broadcastable", *good, hidden=logits[:, :2] > 0)
    refused(r"dropout must lie in \[0, 1\), got 1", *good, dropout=1)
    refused(r"dropout must lie in \[0, 1\), got -0.5", *good, dropout=-0.5)
