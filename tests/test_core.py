"""The core: fast implementation against the paper's equations, masks, windows, steps, learning."""

import copy
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evolving_attention import WINDOWS, AttentionEvolution, evolve, reference

BATCH, HEADS, QUERIES, KEYS = 2, 4, 6, 7


def maps(queries=QUERIES, keys=KEYS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, HEADS, queries, keys)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


def random_mask(queries=QUERIES, keys=KEYS):
    generator = torch.Generator().manual_seed(7)
    return torch.rand(BATCH, 1, queries, keys, generator=generator) > 0.7


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("window", WINDOWS)
def test_equals_the_equations_in_value_and_every_gradient(window, kernel_size, learnable, masked):
    alpha, beta = 0.25, 0.375  # exact in every precision
    layer = AttentionEvolution(HEADS, alpha, beta, kernel_size, window, learnable).double()
    logits, prev = (x.requires_grad_() for x in maps())
    mask = random_mask() if masked else None
    mixing = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (alpha, beta)]
    weights = [layer.weight, layer.bias]

    expected = reference.evolve(logits, prev, *weights, *mixing, window, mask)
    got = layer(logits, prev, mask)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)

    upstream = torch.randn(got.shape, dtype=torch.float64)
    inputs = [logits, prev, *weights]
    own_mixing = [layer.alpha, layer.beta] if learnable else []
    expected_grads = torch.autograd.grad(expected, [*inputs, *mixing], upstream)
    grads = torch.autograd.grad(got, [*inputs, *own_mixing], upstream)
    for grad, expected_grad in zip(grads, expected_grads):  # noqa: B905 (mixing may be missing)
        torch.testing.assert_close(grad.squeeze(), expected_grad.squeeze(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("window", "rows", "columns"),
    [
        ("bidirectional", [2, 3, 4], [2, 3, 4]),
        ("causal", [3, 4, 5], [3, 4, 5]),
        ("cross", [3, 4, 5], [2, 3, 4]),
    ],
)
def test_window_of_a_single_cell(window, rows, columns):
    """Cell (3, 3) influences exactly the cells whose window contains it."""
    logits = torch.zeros(1, 1, 8, 8)
    logits[0, 0, 3, 3] = 1
    ones = torch.ones(1, 1, 3, 3)
    for function in (evolve, reference.evolve):
        out = function(logits, logits, ones, torch.zeros(1), 0.0, 1.0, window)
        reached = [tuple(cell[2:].tolist()) for cell in out.nonzero()]
        assert reached == list(itertools.product(rows, columns))


def test_evolve_without_convolution():
    logits, prev = maps()
    layer = AttentionEvolution(HEADS, 0.3, 0.5).double()
    expected = evolve(logits, prev, None, None, 0.3, 0.0)
    torch.testing.assert_close(evolve(logits, prev, layer.weight, layer.bias, 0.3, 0.0), expected)


def test_initial_weights_are_those_of_torchs_convolution():
    torch.manual_seed(0)
    layer = AttentionEvolution(HEADS, 0.3, 0.5)
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(HEADS, HEADS, 3)
    assert torch.equal(layer.weight, conv.weight) and torch.equal(layer.bias, conv.bias)


@pytest.mark.parametrize("window", WINDOWS)
def test_ablations(window):
    logits, prev = maps()
    plain = AttentionEvolution(HEADS, 0.0, 0.0, window=window)
    assert torch.equal(plain(logits, prev), logits)
    assert list(plain.parameters()) == []
    residual_alone = AttentionEvolution(HEADS, 0.25, 0.0, window=window)
    assert list(residual_alone.parameters()) == []
    torch.testing.assert_close(residual_alone(logits, prev), 0.25 * prev + 0.75 * logits)
    convolution_alone = AttentionEvolution(HEADS, 0.0, 0.5, window=window).double()
    assert torch.equal(convolution_alone(logits, prev), convolution_alone(logits, logits * 3))


@settings(max_examples=40, deadline=None)
@given(
    window=st.sampled_from(WINDOWS),
    kernel_size=st.sampled_from([1, 3, 5]),
    queries=st.integers(1, 8),
    keys=st.integers(1, 8),
    above=st.integers(0, 3),
    left=st.integers(0, 3),
    below=st.integers(0, 3),
    right=st.integers(0, 3),
)
def test_padding_never_changes_a_map(window, kernel_size, queries, keys, above, left, below, right):
    """A map gives the same result alone and anywhere inside a larger, masked map."""
    layer = AttentionEvolution(HEADS, 0.4, 0.6, kernel_size, window).double()
    logits, prev = maps(queries, keys)
    inside = (..., slice(above, above + queries), slice(left, left + keys))
    padded_logits, padded_prev = maps(above + queries + below, left + keys + right, seed=1)
    padded_logits[inside], padded_prev[inside] = logits, prev
    mask = torch.ones(padded_logits.shape, dtype=torch.bool)
    mask[inside] = False
    out = layer(padded_logits, padded_prev, mask)[inside]
    torch.testing.assert_close(out, layer(logits, prev), rtol=0, atol=1e-12)


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize(("window", "grows"), [("causal", True), ("cross", True), ("cross", False)])
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_steps_equal_the_whole_map(window, grows, kernel_size, learnable, chunk):
    layer = AttentionEvolution(HEADS, 0.4, 0.6, kernel_size, window, learnable).double()
    logits, prev = maps(queries=9, keys=9)
    future = torch.ones(9, 9, dtype=torch.bool).triu(1) if grows else None
    whole = layer(logits, prev, future)
    rows, steps = None, []
    for start in range(0, 9, chunk):
        end = min(start + chunk, 9)
        keys = end if grows else 9  # a decoder's own keys are added one by one
        cells = (..., slice(start, end), slice(0, keys))
        mask = None if future is None else future[cells]
        step, rows = layer.step(logits[cells], prev[cells], mask, rows)
        steps.append(torch.nn.functional.pad(step, (0, 9 - keys)))
    together = torch.cat(steps, dim=2)
    if future is not None:
        together, whole = together.masked_fill(future, 0), whole.masked_fill(future, 0)
    torch.testing.assert_close(together, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", ["causal", "cross"])
def test_no_future_is_seen_where_its_cells_are_masked(window):
    layer = AttentionEvolution(HEADS, 0.4, 0.6, 5, window).double()
    logits, prev = (x.requires_grad_() for x in maps(8, 8))
    future = torch.ones(8, 8, dtype=torch.bool).triu(1)
    visible = layer(logits, prev, future).masked_fill(future, 0)
    grads = torch.autograd.grad(visible[:, :, :4].sum(), [logits, prev])
    for grad in grads:
        assert grad[:, :, :4, :4].abs().sum() > 0
        assert grad[:, :, 4:].abs().sum() == 0
        assert grad[:, :, :, 4:].abs().sum() == 0


def test_learned_mixing_stays_in_the_unit_interval_and_comes_back():
    layer = AttentionEvolution(HEADS, 0.0, 1.0, learnable=True).double()
    with torch.no_grad():
        layer.alpha.fill_(-0.5)
        layer.beta.fill_(1.5)
    alpha, beta = layer.mixing_weights()
    assert (alpha, beta) == (0.0, 1.0)
    (alpha + 2 * beta).backward()  # as without bounds
    assert (layer.alpha.grad, layer.beta.grad) == (1, 2)


def test_learned_mixing_leaves_zero_by_gradient_descent():
    """From the plain model (alpha = beta = 0), training finds a teacher's alpha and beta."""
    torch.manual_seed(0)
    teacher = AttentionEvolution(HEADS, 0.6, 0.3)
    student = AttentionEvolution(HEADS, 0.0, 0.0, learnable=True)
    convolution = {"weight": teacher.weight, "bias": teacher.bias}
    student.load_state_dict(convolution)
    optimizer = torch.optim.Adam([student.alpha, student.beta], lr=0.02)
    logits, prev = (x.float() for x in maps())
    for _ in range(300):
        loss = (student(logits, prev) - teacher(logits, prev)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert student.alpha.item() == pytest.approx(0.6, abs=0.02)
    assert student.beta.item() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("learnable", [False, True])
def test_half_precision(dtype, learnable):
    layer = AttentionEvolution(HEADS, 0.25, 0.375, learnable=learnable).double()
    logits, prev = (x.to(dtype) for x in maps())
    exact = layer(logits.double(), prev.double())
    out = layer.to(dtype)(logits, prev)
    assert out.dtype == dtype
    error = (out.double() - exact).abs().max()
    assert error < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("learnable", [False, True])
def test_autocast_of_single_precision_maps(learnable):
    layer = AttentionEvolution(HEADS, 0.25, 0.375, learnable=learnable)
    logits, prev = (x.float() for x in maps())
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(logits, prev)
    torch.testing.assert_close(out.float(), layer(logits, prev), rtol=0, atol=0.03)


def test_made_on_the_meta_device():
    layer = AttentionEvolution(HEADS, 0.25, 0.375, learnable=True, device="meta").to_empty(
        device="cpu"
    )
    layer.reset_parameters()
    assert (layer.alpha.item(), layer.beta.item()) == (0.25, 0.375)
    assert layer(*(x.float() for x in maps())).isfinite().all()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("learnable", [False, True])
def test_scripted_and_compiled(reload, window, learnable):
    layer = AttentionEvolution(HEADS, 0.3, 0.4, window=window, learnable=learnable).double()
    logits, prev = maps()
    expected = layer(logits, prev, random_mask())
    scripted = reload(torch.jit.script(layer))
    torch.testing.assert_close(scripted(logits, prev, random_mask()), expected)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, prev, random_mask()), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, r"alpha must lie in \[0, 1\], got -0.1"),
        ({"alpha": float("nan")}, "alpha must lie"),
        ({"beta": 1.5}, r"beta must lie in \[0, 1\], got 1.5"),
        ({"kernel_size": 2}, "kernel_size must be odd and positive .*, got 2"),
        ({"kernel_size": 0}, "kernel_size must be odd"),
        ({"kernel_size": -3}, "kernel_size must be odd"),
        (
            {"window": "centred"},
            "window must be one of bidirectional, causal, cross, got 'centred'",
        ),
        ({"alpha": "a"}, r"alpha must lie in \[0, 1\], got 'a'"),
        ({"kernel_size": 3.0}, "kernel_size must be odd and positive .*, got 3.0"),
        ({"learnable": "false"}, "learnable must be True or False, got 'false'"),
        ({"num_heads": 2.0}, "num_heads must be a whole number of 1 or more, got 2.0"),
        ({"num_heads": 0}, "num_heads must be a whole number of 1 or more, got 0"),
        ({"num_heads": -4}, "num_heads must be a whole number of 1 or more, got -4"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionEvolution(**{"num_heads": HEADS, "alpha": 0.1, "beta": 0.1, **options})


def test_numpys_booleans_are_flags():
    layer = AttentionEvolution(HEADS, 0.1, 0.1, learnable=np.bool_(True))
    assert layer.learnable is True


def test_other_dtypes_are_named():
    logits, prev = maps()
    layer = AttentionEvolution(HEADS, 0.1, 0.1).double()
    weights = {"weight": layer.weight, "bias": layer.bias, "alpha": 0.1, "beta": 0.1}
    learned = torch.tensor([0.1], dtype=torch.float64)
    for name, wrong in (
        ("weight", layer.weight.float()),
        ("bias", layer.bias.float()),
    ):
        with pytest.raises(ValueError, match=f"^{name} has dtype torch.float32, attn_logits"):
            evolve(logits, prev, **{**weights, name: wrong})
    expected = evolve(logits, prev, **weights)
    for number in (learned, learned.float()):  # as a module has it, whatever the map's dtype
        given = evolve(logits, prev, **{**weights, "alpha": number, "beta": number})
        torch.testing.assert_close(given, expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="attn_logits must have a floating-point dtype, got .*64"):
        layer(logits.long(), prev.long())
    weights = {**weights, "weight": layer.weight.float(), "bias": layer.bias.float()}
    with torch.autocast("cpu"):  # which casts the weights
        half = evolve(logits.bfloat16(), prev.bfloat16(), **weights)
    torch.testing.assert_close(half.double(), expected, atol=0.05, rtol=0.05)


def test_what_is_no_tensor_is_named():
    layer = AttentionEvolution(HEADS, 0.1, 0.1).double()
    logits, prev = maps()
    for name in ("attn_logits", "prev_attn_logits", "mask"):
        given = {"attn_logits": logits, "prev_attn_logits": prev, name: np.zeros(3, dtype=bool)}
        with pytest.raises(ValueError, match=f"{name} must be a tensor.*, got ndarray"):
            layer(**given)


def test_a_checkpoint_with_nan_is_named():
    diverged = AttentionEvolution(HEADS, 0.1, 0.1, learnable=True)
    diverged.alpha.data.fill_(float("nan"))
    layer = AttentionEvolution(HEADS, 0.3, 0.1)
    layer.adopt(diverged.state_dict(), "", ["alpha", "beta"])
    assert layer.mixing == (0.3, 0.1)
    with pytest.raises(
        RuntimeError, match="alpha is nan in the checkpoint, .* made with alpha=0.3"
    ):
        layer.load_state_dict(diverged.state_dict())


def test_bad_maps():
    layer = AttentionEvolution(HEADS, 0.1, 0.1).double()
    logits, prev = maps()
    with pytest.raises(ValueError, match="prev_attn_logits has shape .* attn_logits"):
        layer(logits, prev[..., :-1])
    with pytest.raises(ValueError, match="prev_attn_logits has shape"):
        layer(logits, prev[:, :2])
    with pytest.raises(ValueError, match="attn_logits has 2 heads, .* num_heads=4"):
        layer(logits[:, :2], prev[:, :2])
    with pytest.raises(ValueError, match=r"prev_attn_logits has dtype torch.float32"):
        layer(logits, prev.float())
    with pytest.raises(ValueError, match="attn_logits must be"):
        layer(logits[0], prev[0])
    with pytest.raises(ValueError, match="mask must be of dtype torch.bool"):
        layer(logits, prev, random_mask().float())
    with pytest.raises(ValueError, match="mask must be broadcastable"):
        layer(logits, prev, random_mask()[..., :-1])
    for shape in [(7, 1, 1, 1), (1, 7, 1, 1), (1, 1, 7, 1), (1, 1, 1, 1, 1), (7, 5)]:
        with pytest.raises(ValueError, match="mask must be broadcastable"):
            layer(logits[:1, :, :1], prev[:1, :, :1], torch.zeros(shape, dtype=torch.bool))
    with pytest.raises(ValueError, match="weight and bias must both be given"):
        evolve(logits, prev, layer.weight, None, 0.1, 0.1)
    decoding = AttentionEvolution(HEADS, 0.1, 0.1, window="causal").double()
    with pytest.raises(ValueError, match="window must be one of"):
        layer(logits, prev, window="round")
    with pytest.raises(ValueError, match="window must be one of"):
        AttentionEvolution(HEADS, 0.1, 0.0)(logits, prev, window="round")
    for call in (layer, decoding.step, partial(evolve, weight=None, bias=None, alpha=0.1, beta=0)):
        with pytest.raises(ValueError, match="must be the map of the previous layer, got None"):
            call(logits, None)
    with pytest.raises(ValueError, match="weight must be"):
        evolve(logits, prev, layer.weight[:2], layer.bias, 0.1, 0.1)
    with pytest.raises(ValueError, match="weight must be"):
        evolve(logits, prev, layer.weight, layer.bias[:2], 0.1, 0.1)
    with pytest.raises(ValueError, match="weight must be"):
        evolve(logits, prev, layer.weight[0, 0, 0, 0], layer.bias, 0.1, 0.1)
    with pytest.raises(ValueError, match="alpha must be a number or a tensor of one"):
        evolve(logits, prev, layer.weight, layer.bias, torch.rand(9, 1, 1, 1), 0.1)
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        evolve(logits, prev, layer.weight[..., :2, :2], layer.bias, 0.1, 0.1)
    with pytest.raises(ValueError, match="beta must lie"):
        evolve(logits, prev, layer.weight, layer.bias, 0.1, -0.5)
    with pytest.raises(ValueError, match="window must be causal or cross"):
        layer.step(logits, prev)
    keys = logits.size(3)
    for rows in (logits[:, :, :1], logits.new_zeros(*logits.shape[:2], 2, keys + 1)):
        with pytest.raises(ValueError, match=rf"rows must be .*2, {keys} or fewer"):
            decoding.step(logits, prev, None, rows)
    with pytest.raises(ValueError, match="window must be one of"):
        evolve(logits, prev, None, None, 0.1, 0.0, window="round")


def test_learned_mixing_under_functional_transforms():
    layer = AttentionEvolution(HEADS, 0.25, 0.375, learnable=True).double()
    logits, prev = maps()
    parameters = dict(layer.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (logits, prev)).square().mean()

    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    got = torch.func.grad(loss)(parameters)
    torch.testing.assert_close(list(got.values()), list(expected))


LARGE = (1, 3, 90, 81)  # more than PyTorch uses its own convolution for


def large(shape=LARGE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator)


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_traced_module_is_right_for_other_sizes(reload, window, learnable):
    module = AttentionEvolution(3, 0.3, 0.5, window=window, learnable=learnable)
    traced = reload(torch.jit.trace(module, (large(), large(seed=1))))
    for keys in (80, 83, 8):
        maps = large((2, 3, 90, keys)), large((2, 3, 90, keys), seed=1)
        torch.testing.assert_close(traced(*maps), module(*maps), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("alpha", "beta"),
    [(torch.zeros(1), torch.ones(1)), (torch.tensor([-0.5]), torch.tensor([1.5]))],
)
def test_learned_mixing_at_and_beyond_its_bounds_in_every_mode(reload, alpha, beta):
    maps = large(), large(seed=1)
    layer = AttentionEvolution(3, 0.0, 1.0, learnable=True)
    layer.load_state_dict({**layer.state_dict(), "alpha": alpha, "beta": beta})
    scripted, traced = torch.jit.script(layer), torch.jit.trace(layer, maps)
    gradients = []
    for module in (layer, reload(scripted), reload(traced), torch.compile(copy.deepcopy(layer))):
        evolved = module(*maps)
        torch.testing.assert_close(evolved, evolve(*maps, layer.weight, layer.bias, 0.0, 1.0))
        evolved.square().mean().backward()
        named = dict(getattr(module, "_orig_mod", module).named_parameters())
        gradients.append({name: named[name].grad for name in ("alpha", "beta", "weight", "bias")})
    assert gradients[0]["alpha"] != 0 != gradients[0]["beta"]
    for got in gradients[1:]:
        torch.testing.assert_close(got, gradients[0])


@pytest.mark.parametrize("batch", [2, 16])
def test_hessian_forward_over_reverse(batch):
    layer = AttentionEvolution(2, 0.25, 0.375).double()
    logits, prev = (large((batch, 2, 3, 3), seed=seed).double() for seed in range(2))

    def loss(logits):
        return layer(logits, prev).pow(3).sum()

    options = {"vectorize": True, "outer_jacobian_strategy": "forward-mode"}
    hessian = torch.autograd.functional.hessian
    torch.testing.assert_close(hessian(loss, logits, **options), hessian(loss, logits))


@pytest.mark.parametrize("learnable", [False, True])
def test_gradients_sample_by_sample(learnable):
    """torch.func: vmap of grad equals one sample after the other."""
    module = AttentionEvolution(3, 0.3, 0.5, learnable=learnable)
    weights = {name: value.detach() for name, value in module.named_parameters()}

    def loss(weights, logits, prev):
        return (
            torch.func.functional_call(module, weights, (logits[None], prev[None])).square().sum()
        )

    maps = large((3, *LARGE[1:])), large((3, *LARGE[1:]), seed=1)
    together = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, *maps)
    for index in range(3):
        module.zero_grad()
        module(*(x[index : index + 1] for x in maps)).square().sum().backward()
        for name, value in module.named_parameters():
            torch.testing.assert_close(together[name][index], value.grad, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("heads", [1, 3, 4, 6, 8, 12, 16])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_large_maps_equal_the_equations_in_every_gradient(window, heads, kernel_size):
    layer = AttentionEvolution(heads, 0.25, 0.375, kernel_size, window).double()
    logits, prev, upstream = (large((17, heads, 7, 13), seed=seed).double() for seed in range(3))
    inputs = [logits.requires_grad_(), prev.requires_grad_(), layer.weight, layer.bias]
    expected = reference.evolve(*inputs, 0.25, 0.375, window)
    got = layer(logits, prev)
    torch.testing.assert_close(got, expected)
    expected_grads = torch.autograd.grad(expected, inputs, upstream, retain_graph=True)
    grads = torch.autograd.grad(got, inputs, upstream, retain_graph=True)
    torch.testing.assert_close(grads, expected_grads)
    for one, expected_grad in zip(inputs, expected_grads, strict=True):  # the others frozen
        frozen = {id(x) for x in inputs} - {id(one)}
        args = [x.detach() if id(x) in frozen else x for x in inputs]
        alone = torch.autograd.grad(evolve(*args, 0.25, 0.375, window), one, upstream)
        torch.testing.assert_close(alone[0], expected_grad)


@pytest.mark.parametrize("window", WINDOWS)
def test_second_and_forward_mode_derivatives(window):
    layer = AttentionEvolution(3, 0.25, 0.375, window=window).double()
    logits, prev = (large((16, 3, 3, 4), seed=seed).double() for seed in range(2))

    def evolved(*args):
        return evolve(*args, 0.25, 0.375, window).square()

    args = [x.detach().requires_grad_() for x in (logits, prev, layer.weight, layer.bias)]
    assert torch.autograd.gradcheck(evolved, args, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(evolved, args, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 2, 4, 6, 12])
@pytest.mark.parametrize("keys", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("window", ["bidirectional", "causal"])
def test_few_keys_equal_torchs_own_convolution(window, keys, heads, dtype):
    torch.manual_seed(0)
    layer = AttentionEvolution(heads, 0.25, 0.375, window=window).to(dtype)
    shape = (16, 5, keys, heads)  # heads last in memory
    logits, prev, upstream = (large(shape, seed=i).to(dtype).permute(0, 3, 1, 2) for i in range(3))
    inputs = [logits.requires_grad_(), prev.requires_grad_(), layer.weight, layer.bias]
    pairs = zip(
        logits.split(4), prev.split(4), strict=True
    )  # too small for the other implementation
    expected = torch.cat([layer(*maps) for maps in pairs])
    expected_grads = torch.autograd.grad(expected, inputs, upstream)
    got = layer(logits, prev)
    grads = torch.autograd.grad(got, inputs, upstream)
    with torch.no_grad():
        without = layer(logits, prev)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    expected = (expected, expected, *expected_grads)
    for one, other in zip((got, without, *grads), expected, strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max().clamp(min=1)


def test_batched_gradients():
    layer = AttentionEvolution(4, 0.25, 0.375).double()
    logits = large((16, 4, 9, 11)).double().requires_grad_()
    evolved = layer(logits, logits.detach())
    upstream = large((3, *evolved.shape), seed=1).double()
    (batched,) = torch.autograd.grad(
        evolved, logits, upstream, retain_graph=True, is_grads_batched=True
    )
    for one, grad in zip(upstream, batched, strict=True):
        expected = torch.autograd.grad(evolved, logits, one, retain_graph=True)
        torch.testing.assert_close(grad, expected[0])


def test_autocast_gives_the_same_with_and_without_gradients():
    layer = AttentionEvolution(4, 0.25, 0.375)
    maps = large((16, 4, 9, 11)), large((16, 4, 9, 11), seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        evolved = layer(*maps)
        with torch.no_grad():
            torch.testing.assert_close(layer(*maps), evolved, atol=1e-6, rtol=0)
    upstream, inputs = large((16, 4, 9, 11), seed=2), [layer.weight, layer.bias]
    grads = torch.autograd.grad(evolved, inputs, upstream, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # changes nothing about the backward pass
        again = torch.autograd.grad(evolved, inputs, upstream)
    assert all(map(torch.equal, again, grads))
    with pytest.raises(RuntimeError):
        layer.double()(*maps)
    maps = [x.double() for x in maps]
    expected = layer(*maps)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # autocast does not change float64
        torch.testing.assert_close(layer(*maps), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("mask_shape", [None, (9, 1, 1, 31), (1, 1, 20, 31), (20, 31)])
@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("window", WINDOWS)
def test_without_gradients_equals_with(window, alpha, beta, learnable, mask_shape, mode):
    module = AttentionEvolution(6, alpha, beta, window=window, learnable=learnable)
    maps = large((9, 6, 20, 31)), large((9, 6, 20, 31), seed=1)
    given = [x.clone() for x in maps]
    mask = None if mask_shape is None else large(mask_shape, seed=2) > 1
    expected = module(*maps, mask)
    with mode():
        got = module(*maps, mask)
        assert got.is_contiguous()
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
        cells = None if mask is None else mask.expand(9, 1, 20, 31)[4:5]
        alone = module(*(x[4:5] for x in maps), cells)
    torch.testing.assert_close(alone, expected[4:5], atol=1e-6, rtol=1e-5)
    assert all(map(torch.equal, maps, given))


LOWEST = {dtype: torch.finfo(dtype).min for dtype in (torch.float32, torch.float16, torch.bfloat16)}
FUTURE = torch.ones(QUERIES, QUERIES, dtype=torch.bool).triu(1)
PADDING = torch.zeros(BATCH, 1, 1, QUERIES, dtype=torch.bool)
PADDING[1, ..., 4:] = True


@pytest.mark.parametrize("masks", [FUTURE, PADDING, PADDING.flip(3), PADDING | FUTURE])
@pytest.mark.parametrize("dtype", LOWEST)
@pytest.mark.parametrize("number", ["-inf", "-1e9", "-1e4", "lowest"])
def test_masked_logits_are_an_error_that_names_the_remedy(masks, dtype, number):
    logits, prev = (x.to(dtype) for x in maps(QUERIES, QUERIES))
    low = LOWEST[dtype] if number == "lowest" else float(number)
    low = low if low == float("-inf") else max(low, LOWEST[dtype])
    layer = AttentionEvolution(HEADS, 0.1, 0.1, window="causal").to(dtype)
    weights = (layer.weight, layer.bias, 0.1, 0.1, "causal")
    for wrong in (
        {"attn_logits": logits.masked_fill(masks, low)},
        {"attn_logits": logits + torch.zeros(masks.shape, dtype=dtype).masked_fill(masks, low)},
        {"prev_attn_logits": prev.masked_fill(masks, low)},
    ):
        (name,) = wrong
        given = {"attn_logits": logits, "prev_attn_logits": prev, **wrong}
        message = f"^{name} must not be masked yet, but holds -.*mask=... .bool, True: no cell"
        for function in (layer, layer.step):
            with pytest.raises(ValueError, match=message):
                function(**given)
        with pytest.raises(ValueError, match=message):
            evolve(given["attn_logits"], given["prev_attn_logits"], *weights)
        # With the mask, what stands in the masked cells does not matter.
        right = layer(logits, prev, masks)
        assert torch.equal(layer(**given, mask=masks), right)
        with pytest.raises(ValueError, match=message):  # the mask of something else
            layer(**given, mask=torch.zeros_like(masks))


@pytest.mark.parametrize("queries", [1, 2, 5, 6, 7, 8])
def test_a_mask_of_the_last_query_only_is_found(queries):
    logits, prev = maps(queries, queries)
    logits[:, :, -1, 0] = float("-inf")
    with pytest.raises(ValueError, match="attn_logits must not be masked yet"):
        AttentionEvolution(HEADS, 0.1, 0.1).double()(logits, prev)


def test_shapes_on_the_meta_device():
    logits, prev = (x.to("meta") for x in maps())
    layer = AttentionEvolution(HEADS, 0.1, 0.1).to("meta", torch.float64)
    evolved = evolve(logits, prev, layer.weight, layer.bias, 0.1, 0.1)
    assert evolved.shape == layer(logits, prev).shape == logits.shape


@pytest.mark.parametrize("heads", [6, 8])
@pytest.mark.parametrize("kernel_size", [3, 5, 7, 11])
def test_wide_kernels_in_bfloat16(kernel_size, heads):
    """Convolutions of some widths are wrong on processors with AMX."""
    torch.manual_seed(0)
    layer = AttentionEvolution(heads, 0.5, 0.5, kernel_size)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        logits, prev = torch.randn(2, 2, heads, 60, 32, generator=torch.manual_seed(1))
        logits.requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            evolved = layer(logits, prev)
        found.append((evolved.detach(), *torch.autograd.grad(evolved.square().sum(), logits)))
    for exact, rounded in zip(*found, strict=True):
        assert (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("queries", [4, 8, 9, 64])
def test_a_mask_that_spares_the_first_and_the_last_query_is_found(queries):
    """Each token sees its neighbours; the first and the last one see all, and are seen by all."""
    place = torch.arange(queries)
    seen = (place[:, None] - place).abs() <= queries // 8
    seen[[0, -1]] = seen[:, [0, -1]] = True
    logits, prev = maps(queries, queries)
    with pytest.raises(ValueError, match="attn_logits must not be masked yet"):
        AttentionEvolution(HEADS, 0.1, 0.1).double()(logits.masked_fill(~seen, -1e9), prev)


@pytest.mark.parametrize("low", [float("-inf"), -1e9])
def test_masked_logits_and_a_learned_alpha(low):
    """Under the mask, -inf makes the gradient of alpha NaN, and a number does not."""
    layer = AttentionEvolution(HEADS, 0.1, 0.1, learnable=True).double()
    logits, prev = (x.masked_fill(FUTURE, low) for x in maps(QUERIES, QUERIES))
    if low == -1e9:
        layer(logits, prev, FUTURE).sum().backward()
        assert layer.alpha.grad.isfinite().all()
    else:
        with pytest.raises(ValueError, match="attn_logits must not be masked yet"):
            layer(logits, prev, FUTURE)


@settings(max_examples=30, deadline=None)
@given(
    scale=st.sampled_from([1.0, 1e2, 1e3, 1e5, 1e30, float("inf")]),
    queries=st.integers(1, 6),
    keys=st.integers(1, 6),
)
def test_logits_that_are_not_masked_pass(scale, queries, keys):
    """Also those of a training that diverges, in which numbers are as large above 0, or NaN."""
    logits, prev = maps(queries, keys)
    logits = torch.cat([logits, logits.abs()], dim=1) * scale
    prev = torch.cat([prev, prev.abs()], dim=1) * scale
    out = AttentionEvolution(2 * HEADS, 0.1, 0.1).double()(logits, prev)
    assert out.shape == logits.shape


@pytest.mark.parametrize("low", [-9_000.0, -10_403.0, -50_000.0])
def test_large_negative_logits_are_no_masks(low):
    logits, prev = maps(QUERIES, QUERIES)
    logits[0, 0, 0, 0] = low
    assert AttentionEvolution(HEADS, 0.1, 0.1).double()(logits, prev).isfinite().all()


def test_numbers_halfway_to_a_mask_show_that_it_is_none():
    layer = AttentionEvolution(HEADS, 0.1, 0.1).double()
    logits, prev = maps(QUERIES, QUERIES)
    logits[0, 0, 0, 0] = -9_943.0
    with pytest.raises(ValueError, match="attn_logits must not be masked yet, but holds -9943"):
        layer(logits, prev)
    logits[0, 1, 0, 0] = -5_000.0
    assert layer(logits, prev).isfinite().all()


def test_graphs_hold_no_check():
    layer = AttentionEvolution(HEADS, 0.1, 0.1).double()
    right, wrong = maps(), [x.masked_fill(random_mask(), float("-inf")) for x in maps()]
    traced = torch.fx.symbolic_trace(layer, concrete_args={"mask": None, "window": None})
    called = {node.target for node in traced.graph.nodes}
    assert "check_values" not in str(called) and not {"amin", "item"} & called
    exported = torch.export.export(layer, tuple(right)).module()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert not any("amin" in str(node.target) for node in exported.graph.nodes)
    graphs = [traced, exported, compiled, torch.jit.script(layer), torch.jit.trace(layer, right)]
    from torch.fx.experimental.proxy_tensor import make_fx

    graphs.append(make_fx(layer)(*right))
    for graph in graphs:
        torch.testing.assert_close(graph(*right), layer(*right))
        assert graph(*wrong).isnan().any()  # as before: no error, no cost


def test_values_that_cannot_be_read_are_not_read():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        layer = AttentionEvolution(HEADS, 0.1, 0.1)
        assert layer(torch.rand(2, HEADS, 3, 3), torch.rand(2, HEADS, 3, 3)).shape[2:] == (3, 3)
    layer = AttentionEvolution(HEADS, 0.1, 0.1, device="meta")
    logits = torch.rand(2, HEADS, 3, 3, device="meta")
    assert layer(logits, logits).is_meta


@pytest.mark.parametrize("shape", [(0, 7), (7, 0), (0, 0)])
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("batch", [2, 17])
def test_no_queries_or_no_keys_give_an_empty_map(reload, window, kernel_size, shape, batch):
    layer = AttentionEvolution(HEADS, 0.1, 0.1, kernel_size, window)
    logits = torch.rand(batch, HEADS, *shape, requires_grad=True)
    for function in (layer, reload(torch.jit.script(layer))):
        out = function(logits, logits, torch.zeros(shape, dtype=torch.bool))
        assert out.shape == logits.shape
        out.sum().backward()
    if window != "bidirectional":
        rows = torch.rand(batch, HEADS, kernel_size - 1, shape[1])
        out, kept = layer.step(logits, logits, None, rows)
        assert out.shape == logits.shape
        if shape[0] == 0:
            assert torch.equal(kept, rows)


@pytest.mark.parametrize("batch", [1, 2])  # with one head and one sentence, slices are contiguous
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("queries", [1, 512])
def test_the_rows_of_a_step_keep_no_other_memory_alive(batch, heads, queries):
    layer = AttentionEvolution(heads, 0.1, 0.1, window="cross")
    logits = torch.rand(batch, heads, queries, 20)
    _, rows = layer.step(logits, logits)
    assert rows.shape == (batch, heads, 2, 20)
    assert rows.untyped_storage().nbytes() == rows.numel() * rows.element_size()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(3, 4, 2, 5), r"rows must be .*\(2, 4, 2, 5 or fewer\), got .*\[3, 4, 2, 5\]"),
        (torch.zeros(2, 1, 2, 5), r"rows must be .*got .*\[2, 1, 2, 5\]"),
        (torch.zeros(2, 4, 4, 5), r"rows must be .*got .*\[2, 4, 4, 5\]"),
        (torch.zeros(2, 4, 2, 6), r"rows must be .*got .*\[2, 4, 2, 6\]"),
        (torch.zeros(4, 2, 5), r"rows must be .*got .*\[4, 2, 5\]"),
        (torch.zeros(2, 4, 2, 5).double(), "rows has dtype torch.float64, the map torch.float32"),
    ],
)
def test_bad_rows_are_named(rows, message):
    layer = AttentionEvolution(4, 0.1, 0.1, window="causal")
    logits = torch.rand(2, 4, 1, 5)
    with pytest.raises(ValueError, match=message):
        layer.step(logits, logits, None, rows)
