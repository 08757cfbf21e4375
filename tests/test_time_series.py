"""EA-DC-Transformer: the network's laws, its preparation of data, the estimators, the task."""

import gzip
import importlib
import inspect
import json
import pickle
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from aeon.testing.data_generation import (
    make_example_3d_numpy,
    make_example_3d_numpy_list,
)
from aeon.testing.estimator_checking import parametrize_with_checks
from fairseq import checkpoint_utils
from matplotlib.axes import Axes
from sklearn.exceptions import NotFittedError
from test_fairseq_commands import ENVIRONMENT, USER_DIR, fairseq, weights
from torch.nn import functional as F

from ea_aeon import EADCTransformerClassifier, EADCTransformerRegressor
from ea_aeon.data import Preparation, collate, pad, read, split_off
from ea_aeon.estimators import NETWORK_OPTIONS, MicroBatchedNet
from ea_aeon.network import (
    CausalConv,
    DCTransformer,
    Ensemble,
    MaskedBatchNorm,
    RelativeLogits,
)
from ea_fairseq.models.ea_dc_transformer import EADCTransformerConfig
from ea_fairseq.tasks.time_series import TimeSeriesConfig
from evolving_attention import AttentionEvolution, collect_maps, reference

SMALL = {"d_model": 16, "ffn_dim": 16, "num_blocks": 3, "num_heads": 2, "attention_dim": 4}
VARIANTS = [
    {},
    {"causal": True},
    {"learnable": True},
    {"alpha": 0.0, "beta": 0.0},
    {"alpha": 0.5, "beta": 0.0},
    {"alpha": 0.0, "beta": 0.5, "evolution_kernel_size": 5},
    {"max_distance": 2},
    {"attention_dim": 0},
    {"readout": "mean"},
    {"readout": "flatten", "positions": "learned", "key_dim": 8},
    {"num_segments": 7, "positions": "none"},
]


def build(channels=3, outputs=4, seed=0, **options):
    """A small network in float64, whose normalisation has non-trivial statistics."""
    torch.manual_seed(seed)
    network = DCTransformer(channels, outputs, 40, **{**SMALL, **options}).double()
    for module in network.modules():
        if isinstance(module, MaskedBatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return network.eval()


def series(*lengths, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(length, channels, generator=generator, dtype=torch.float64)
        for length in lengths
    ]


# ------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("length", [1, 2, 17])
def test_a_series_alone_equals_itself_in_a_padded_batch(options, length):
    network = build(**options)
    (alone,) = series(length)
    expected = network(**pad([alone]))
    batch = pad([alone, *series(30, 5, seed=1)])
    torch.testing.assert_close(network(**batch)[:1], expected, rtol=0, atol=1e-12)
    batch["series"][0, length:] = float("nan")  # any value
    batch["series"] = batch["series"].nan_to_num(1e3)
    torch.testing.assert_close(network(**batch)[:1], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", VARIANTS)
def test_padding_changes_no_gradient_and_no_statistics_in_training(options):
    """More padding changes nothing in training, with batch normalisation over the real steps."""
    cases = series(9, 4, 1)
    results = []
    for extra in (0, 7):
        network = build(**options, dropout=0.0).train()
        batch = pad(cases)
        batch["series"] = torch.nn.functional.pad(batch["series"], (0, 0, 0, extra), value=5.0)
        network(**batch).square().sum().backward()
        gradients = {name: p.grad for name, p in network.named_parameters()}
        results.append((gradients, dict(network.named_buffers())))
    for expected, got in zip(*results, strict=True):
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=1e-10, msg=name)


def test_every_weight_gets_a_gradient():
    network = build(learnable=True).train()
    network(**pad(series(9, 12))).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def steps_of(network, case):
    """The network's output for each step of a series, before the mean."""
    steps = []
    handle = network.dropout.register_forward_hook(lambda *call: steps.append(call[2][0]))
    network(**pad([case]))
    handle.remove()
    return steps[-1]


@pytest.mark.parametrize("options", [{}, {"learnable": True}, {"evolution_kernel_size": 5}])
def test_the_causal_option_sees_no_later_step(options):
    """Before the mean over time, no step depends on a later one; without the option, they do."""
    for causal in (True, False):
        network = build(causal=causal, **options)
        (before,) = series(20)
        after = before.clone()
        after[11:] += 1
        outputs = [steps_of(network, case) for case in (before, after)]
        same = (outputs[0] == outputs[1]).all(dim=1)
        assert bool(same[:11].all()) == causal
        assert not same[11:].any()


@pytest.mark.parametrize("max_distance", [1, 4, 50])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_relative_logits_are_those_of_the_distance(length, max_distance):
    relative = RelativeLogits(4, max_distance)
    q = torch.randn(2, 3, length, 4)
    got = relative(q)
    for i in range(length):
        for j in range(length):
            distance = max(-max_distance, min(max_distance, j - i))
            expected = q[:, :, i] @ relative.table[distance + max_distance]
            torch.testing.assert_close(got[:, :, i, j], expected)


@pytest.mark.parametrize("causal", [False, True])
def test_maps_are_those_of_the_equations(causal):
    network = build(causal=causal)
    lengths = (9, 6)
    seen = []

    def keep(module, args, output):
        x, exists, prev = args
        q, k, _ = module.qkv(x).unflatten(2, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        logits = (q @ k.transpose(2, 3) + module.relative(q)) * 2**-0.5
        seen.append((module, logits, exists, prev, output[1]))

    for block in network.blocks:
        for layer in (block.first, block.second):
            layer.attention.register_forward_hook(keep)
    network(**pad(series(*lengths)))
    assert [prev is None for _, _, _, prev, _ in seen] == [True] + [False] * 5
    handed_on = None
    for index, (attention, logits, exists, prev, evolved) in enumerate(seen):
        assert prev is handed_on
        if index < 2:  # the first block is plain
            torch.testing.assert_close(evolved, logits, rtol=0, atol=1e-12)
        else:
            mask = ~(exists[:, None, :, None] & exists[:, None, None, :])
            if causal:
                mask = mask | torch.ones(9, 9, dtype=torch.bool).triu(1)
            evolution = attention.evolution
            window = "causal" if causal else "bidirectional"
            expected = reference.evolve(
                logits, prev, evolution.weight, evolution.bias, 0.3, 0.5, window, mask
            )
            torch.testing.assert_close(evolved, expected, rtol=0, atol=1e-12)
        handed_on = evolved


# The authors' forward pass, with channels before steps as they have it.


def official_conv(layer, x):
    """Both of their convolutions' channels (B, C, L) from a weight-normalised causal Conv1d."""
    conv = layer.conv
    weight = conv.direction / conv.direction.norm(dim=(1, 2), keepdim=True)
    reach = conv.dilation * (weight.size(2) - 1)
    out = F.conv1d(x, weight * conv.gain[:, None, None], conv.bias, 1, reach, conv.dilation)
    return out[:, :, : x.size(2)]


def official_attention(attention, x, exists, prev):
    """Attention's channels (B, dv, L) and the map; their att_conv and relative_logits."""
    heads, (key_width, _, width) = attention.num_heads, attention.widths
    batch, _, length = x.shape
    qkv = attention.qkv.weight @ x + attention.qkv.bias[:, None]
    q, k, v = qkv.split([key_width, key_width, width], dim=1)
    q, k, v = (part.reshape(batch, heads, -1, length) for part in (q, k, v))
    q = q * (key_width // heads) ** -0.5
    logits = q.transpose(2, 3) @ k
    table, far = attention.relative.table, attention.relative.max_distance
    for i in range(length):
        for j in range(length):
            distance = min(max(j - i, -far), far)
            logits[:, :, i, j] += q[..., i] @ table[distance + far]
    absent = ~(exists[:, None, :, None] & exists[:, None, None, :])
    if attention.evolution is not None:
        evolution = attention.evolution
        a_in = 0.3 * prev + 0.7 * logits
        a_in = a_in.masked_fill(absent, 0.0)
        refined = F.conv2d(a_in, evolution.weight, evolution.bias, padding=1).relu()
        logits = 0.5 * refined + 0.5 * a_in
    weights = logits.masked_fill(~exists[:, None, None, :], -torch.inf).softmax(dim=3)
    out = (weights @ v.transpose(2, 3)).transpose(2, 3).reshape(batch, width, length)
    return attention.out_proj.weight @ out + attention.out_proj.bias[:, None], logits


def official_norm(norm, x, exists):
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias) * exists


@pytest.mark.parametrize(
    "options",
    [{"positions": "sinusoidal"}, {"positions": "learned", "key_dim": 8, "max_distance": 4}],
)
def test_the_published_network_is_that_of_the_authors_but_for_its_defects(options):
    """ea_dc_transformer.py of the authors, in float64, with flattened read-out.

    Their defects are mended on both sides: the relative positions are weights, the heads' outputs
    are put together by channel and projected, padding takes no part, and maps go through ReLU in
    the convolution and as they are to the next layer.
    """
    network = build(readout="flatten", **options)
    network(**pad(series(9)))  # nothing is remembered from one batch to the next
    cases = series(9, 6, 40)
    batch = pad(cases)
    exists = torch.arange(40) < batch["lengths"][:, None]
    steps, width = torch.arange(40.0, dtype=torch.float64)[:, None], 16
    x = network.embed(batch["series"]) * width**0.5
    if options["positions"] == "sinusoidal":
        positions = torch.zeros(40, width, dtype=torch.float64)
        rates = torch.exp(torch.arange(0, width, 2).double() * (-np.log(10000.0) / width))
        positions[:, 0::2], positions[:, 1::2] = torch.sin(steps * rates), torch.cos(steps * rates)
        x = x + positions
    else:
        x = x + network.position_table
    x, prev = x.transpose(1, 2), None
    for block in network.blocks:
        out = x
        for layer in (block.first, block.second):
            attended, prev = official_attention(layer.attention, out, exists, prev)
            out = torch.cat([official_conv(layer, out), attended], dim=1)
            out = official_norm(layer.norm, out, exists[:, None])
            out = layer.ffn(out.transpose(1, 2)).transpose(1, 2)
        x = official_norm(block.norm, out + x, exists[:, None])
    x = F.gelu(x.transpose(1, 2)) * exists[..., None]
    expected = network.head(x.reshape(3, -1))
    torch.testing.assert_close(network(**batch), expected, rtol=0, atol=1e-10)


def test_segments_are_means_of_equal_parts():
    network = build(num_segments=3)
    cases = series(9, 7, 2)
    steps = [steps_of(network, case) for case in cases]
    expected = [
        torch.stack([one[:3].mean(0), one[3:6].mean(0), one[6:].mean(0)]) for one in steps[:1]
    ]
    expected.append(torch.stack([x.mean(0) for x in steps[1].split([3, 2, 2])]))
    nothing = torch.zeros(16, dtype=torch.float64)
    expected.append(torch.stack([steps[2][0], steps[2][1], nothing]))
    for case, parts in zip(cases, expected, strict=True):
        torch.testing.assert_close(network(**pad([case]))[0], network.head(parts.flatten()))


@pytest.mark.parametrize("options", [{"readout": "flatten"}, {"positions": "learned"}])
def test_a_series_longer_than_those_of_the_training(options):
    network = build(**options)
    with pytest.raises(ValueError, match="series have up to 41 steps, .* weights for 40"):
        network(**pad(series(41)))
    network(**pad(series(40)))
    assert build()(**pad(series(90))).isfinite().all()


def test_recomputing_attention_changes_no_gradient():
    results = []
    for recompute in (False, True):
        network = build(dropout=0.0, checkpoint_activations=recompute).train()
        network(**pad(series(9, 6))).square().sum().backward()
        results.append([p.grad for p in network.parameters()] + list(network.buffers()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"max_distance": 3, "readout": "flatten"}])
def test_exported_and_compiled_networks(tmp_path, options):
    """torch.export, fullgraph compilation and ONNX, for other batches and lengths than exported."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    members = [build(seed=seed, num_blocks=2, **options) for seed in (1, 2)]
    network = Ensemble(members, True).float().eval()
    example = torch.randn(4, 20, 3), torch.tensor([20, 7, 5, 20])
    other = torch.randn(5, 30, 3), torch.tensor([30, 2, 3, 4, 1])
    batch, steps = torch.export.Dim("batch", max=64), torch.export.Dim("steps", min=2, max=40)
    shapes = {"series": {0: batch, 1: steps}, "lengths": {0: batch}}
    exported = torch.export.export(network, example, dynamic_shapes=shapes)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    for given in (example, other):
        expected = network(*given)
        torch.testing.assert_close(exported.module()(*given), expected)
        torch.testing.assert_close(compiled(*given), expected)
    program = torch.onnx.export(network, example, dynamo=True, dynamic_shapes=shapes, verbose=False)
    program.save(str(tmp_path / "network.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "network.onnx"))
    given = dict(zip([one.name for one in session.get_inputs()], other, strict=True))
    (got,) = session.run(None, {name: value.numpy() for name, value in given.items()})
    torch.testing.assert_close(torch.from_numpy(got), network(*other), rtol=1e-4, atol=1e-5)


def test_a_traced_network_keeps_the_lengths(reload):
    network = build().float().eval()
    full = torch.randn(3, 9, 3), torch.tensor([9, 9, 9])
    traced = reload(torch.jit.trace(network, full))
    for lengths in ([9, 9, 9], [9, 4, 1]):
        given = full[0], torch.tensor(lengths)
        torch.testing.assert_close(traced(*given), network(*given), atol=1e-5, rtol=1e-5)


def test_without_evolution_no_map_is_used():
    """At alpha = beta = 0 there are no evolving weights, and the maps are independent."""
    plain = build(alpha=0.0, beta=0.0)
    assert not [name for name in plain.state_dict() if "evolution" in name]
    learnable = build(learnable=True, alpha=0.0, beta=0.0)
    assert [name for name in learnable.state_dict() if name.endswith("evolution.beta")]
    learnable.load_state_dict(plain.state_dict(), strict=False)
    batch = pad(series(9, 6))
    torch.testing.assert_close(learnable(**batch), plain(**batch), rtol=0, atol=1e-12)


def test_the_convolution_is_torchs_weight_normalised_one():
    conv = CausalConv(3, 4, kernel_size=3, dilation=2).double()
    expected = torch.nn.Conv1d(3, 4, 3, dilation=2).double()
    with torch.no_grad():
        conv.direction.mul_(2)  # which do not affect its output
        conv.gain.uniform_(0.5, 2)
    expected = torch.nn.utils.parametrizations.weight_norm(expected)
    magnitude, direction = expected.parametrizations.weight.parameters()
    with torch.no_grad():
        magnitude.copy_(conv.gain.view(4, 1, 1))
        direction.copy_(conv.direction)
        expected.bias.copy_(conv.bias)
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    out = conv(x)
    other = expected(torch.nn.functional.pad(x.transpose(1, 2), (4, 0))).transpose(1, 2)
    torch.testing.assert_close(out, other)
    weights = [conv.gain, conv.direction, conv.bias]
    others = [magnitude, direction, expected.bias]
    grads = torch.autograd.grad(out.square().sum(), weights)
    for grad, own in zip(grads, torch.autograd.grad(other.square().sum(), others), strict=True):
        torch.testing.assert_close(grad, own.view_as(grad))


def test_options_reach_their_modules():
    network = build(evolution_kernel_size=5, dropout=0.3, map_dropout=0.2, positions="learned")
    evolutions = [m for m in network.modules() if isinstance(m, AttentionEvolution)]
    assert {m.weight.shape[2:] for m in evolutions} == {(5, 5)}
    assert {m.p for m in network.modules() if isinstance(m, torch.nn.Dropout)} == {0.3, 0.2}
    assert 0.015 < network.position_table.abs().max() <= 0.02
    assert network.head.in_features == 4 * 16
    assert build(readout="mean").head.in_features == 16
    assert build(readout="flatten").head.in_features == 40 * 16


def test_one_step_in_training_is_normalised_by_what_was_learned():
    network = build().train()
    out = network(**pad(series(1)))
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("lengths", [[9, 10], [0, 9]])
def test_lengths_that_the_series_do_not_have(lengths):
    message = rf"lengths must lie in \[1, 9\], got {min(lengths)} to {max(lengths)}"
    with pytest.raises(ValueError, match=message):
        build().float()(torch.randn(2, 9, 3), torch.tensor(lengths))


def test_batch_norm_is_torchs_over_the_steps_that_exist():
    norm = MaskedBatchNorm(3)
    x, exists = torch.randn(2, 5, 3), torch.arange(5) < torch.tensor([[5], [2]])
    out = norm(x, exists)
    expected = torch.nn.BatchNorm1d(3)
    torch.testing.assert_close(out[exists], expected(torch.cat([x[0], x[1, :2]])))
    torch.testing.assert_close(norm.running_var, expected.running_var)
    assert not out[1, 2:].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 2}, "alpha must lie in"),
        ({"evolution_kernel_size": 2}, "^evolution_kernel_size must be odd"),
        ({"attention_dim": 5}, "attention_dim must be less than d_model .16. and a multiple"),
        ({"attention_dim": 16}, "attention_dim must be less than d_model"),
        ({"num_blocks": 0}, "num_blocks must be a whole number of 1 or more, got 0"),
        ({"dropout": 1.0}, "dropout must lie in"),
        ({"map_dropout": -0.1}, "^map_dropout must lie in"),
        (
            {"positions": "rotary"},
            "positions must be one of none, sinusoidal, learned, got 'rotary'",
        ),
        ({"readout": "max"}, "readout must be one of segments, mean, flatten, got 'max'"),
        ({"num_segments": 0}, "num_segments must be a whole number of 1 or more, got 0"),
        ({"max_distance": True}, "max_distance must be a whole number of 1 or more, got True"),
        ({"causal": "yes"}, "causal must be True or False, got 'yes'"),
        ({"checkpoint_activations": "no"}, "checkpoint_activations must be True or False"),
        ({"key_dim": 3}, "key_dim must be a multiple of num_heads .2., got 3"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


# ------------------------------------------------------------------------------- data


def test_preparation_standardises_by_the_training_series():
    rng = np.random.default_rng(0)
    training = [rng.normal(5, 3, (2, length)) for length in (40, 70, 10)]
    training[0][1, 3] = np.nan
    preparation = Preparation.fit(training)
    steps = np.concatenate(training, axis=1)
    np.testing.assert_allclose(preparation.mean, np.nanmean(steps, axis=1))
    np.testing.assert_allclose(preparation.std, np.nanstd(steps, axis=1))
    other = rng.normal(0, 1, (2, 6))
    (got,) = preparation([other])
    expected = (other - np.nanmean(steps, axis=1)[:, None]) / np.nanstd(steps, axis=1)[:, None]
    np.testing.assert_allclose(got.numpy(), expected.T, rtol=1e-5)


@pytest.mark.parametrize("differences", [0, 1])
def test_a_channel_that_never_changes(differences):
    cases = [np.stack([np.full(7, 0.1), np.arange(7.0)])]
    (prepared,) = Preparation.fit(cases, differences)(cases)
    for channel in range(0, prepared.shape[1], 2):
        assert prepared[:, channel].abs().max() < 1e-3 < prepared[:, channel + 1].abs().max()


def test_differences_are_channels_of_unit_size():
    rng = np.random.default_rng(0)
    training = [rng.normal(5, [[3], [0.1]], (2, length)) for length in (40, 70, 10)]
    training[0][1, 3] = np.nan
    preparation = Preparation.fit(training, differences=2)
    assert preparation.num_channels == 6
    first, second = (
        torch.cat([case[:, order : order + 2] for case in preparation(training)])
        for order in (2, 4)
    )
    for changes in (first, second):
        torch.testing.assert_close((changes**2).mean(0), torch.ones(2))
    (case,) = preparation([np.array([[0.0, 1.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]])])
    change, change_of_change = case[:, 2], case[:, 4]
    torch.testing.assert_close(change / change[1], torch.tensor([0.0, 1.0, 2.0, 0.0]))
    torch.testing.assert_close(
        change_of_change / change_of_change[1], torch.tensor([0.0, 1.0, 1.0, -2.0])
    )
    assert case[:, [3, 5]].eq(0).all()


@pytest.mark.parametrize("differences", [-1, 1.5, None])
def test_bad_orders_of_differences_are_named(differences):
    with pytest.raises(ValueError, match="differences must be 0 or more, got"):
        Preparation.fit([np.zeros((1, 3))], differences)


def test_missing_values_are_interpolated_and_the_input_stays_as_it_was():
    nan = np.nan
    case = np.array([[nan, 1.0, nan, nan, 4.0, nan], [nan] * 6, [7.0] * 6])
    given = case.copy()
    preparation = Preparation.fit([case])
    assert preparation.std[1:] == [1, 1]  # nothing there, and nothing that changes
    (got,) = preparation([case])
    got = got.numpy() * preparation.std + preparation.mean
    np.testing.assert_allclose(got[:, 0], [1, 1, 2, 3, 4, 4], rtol=1e-6)
    np.testing.assert_allclose(got[:, 1], 0)
    np.testing.assert_allclose(got[:, 2], 7)
    np.testing.assert_array_equal(case, given)


@pytest.mark.parametrize("scale", [1e-20, 1e-9, 1e9])
def test_the_unit_of_a_channel_does_not_matter(scale):
    cases = [np.random.default_rng(0).normal(3, 1, (2, 9))]
    (expected,) = Preparation.fit(cases)(cases)
    scaled = [case * scale for case in cases]
    torch.testing.assert_close(Preparation.fit(scaled)(scaled)[0], expected)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (np.full((2, 5), 1e300), "series 1 has values too large"),
        (np.zeros((3, 5)), r"series 1 must have shape \(2, steps\).*got \(3, 5\)"),
        (np.zeros((2, 0)), r"series 1 must have shape .*got \(2, 0\)"),
        (np.full((2, 5), np.inf), "series 1 has infinite values"),
    ],
)
def test_unfit_series_are_named(case, message):
    preparation = Preparation.fit([np.random.default_rng(0).normal(size=(2, 5))])
    with pytest.raises(ValueError, match=message):
        preparation([np.zeros((2, 5)), case])


def test_validation_is_a_stratified_part_drawn_by_the_seed():
    labels = np.repeat(["a", "b"], [80, 20])
    training, validation = split_off(100, 0.2, 1, labels)
    assert sorted([*training, *validation]) == list(range(100))
    assert len(validation) == 20 and 3 <= (labels[validation] == "b").sum() <= 5
    assert (split_off(100, 0.2, 1, labels)[1] == validation).all()
    assert (split_off(100, 0.2, 2, labels)[1] != validation).any()
    for seed in range(10):  # each class keeps a case to learn from
        for few in (list("abc"), list("aabbc"), list("abbbbbbbbb"), list("aabbccddeeff")):
            training, _ = split_off(len(few), 0.4, seed, few)
            assert {few[index] for index in training} == set(few)
    assert len(split_off(4, 0.0, 1)[1]) == 0
    with pytest.raises(ValueError, match="validation_fraction must lie in"):
        split_off(4, 1.0, 1)


def ts_file(series, targets, regression):
    """The text of a .ts file."""
    kind = (
        "@targetlabel true" if regression else f"@classLabel true {' '.join(sorted(set(targets)))}"
    )
    lines = ["@problemName Made", "@timeStamps false", "@missing true", "@univariate false"]
    lines += ["@equalLength false", kind, "@data"]
    for case, target in zip(series, targets, strict=True):
        channels = [",".join("?" if np.isnan(x) else f"{x:.4f}" for x in row) for row in case]
        lines.append(":".join([*channels, str(target)]))
    return "\n".join(lines) + "\n"


def make_dataset(folder, name, regression=False, seed=0, train=48, test=24):
    """Series of unequal length with gaps, told apart by the sign of a bump in channel 0."""
    rng = np.random.default_rng(seed)
    (folder / name).mkdir(parents=True)
    for split, count in (("TRAIN", train), ("TEST", test)):
        cases, targets = [], []
        for _ in range(count):
            length = rng.integers(6, 14)
            size = rng.choice([-1.0, 1.0]) if not regression else rng.uniform(-1, 1)
            case = rng.normal(0, 0.2, (2, length))
            case[0] += size * np.sin(np.linspace(0, np.pi, length))
            case[1, rng.integers(length)] = np.nan
            cases.append(case)
            targets.append(f"{100 + 10 * size:.3f}" if regression else {-1: "down", 1: "up"}[size])
        text = ts_file(cases, targets, regression)
        (folder / name / f"{name}_{split}.ts").write_text(text)
    return folder


def test_reading(tmp_path):
    make_dataset(tmp_path, "Bumps")
    data = read("Bumps", "train", str(tmp_path))
    assert not data.is_regression
    assert len(data.series) == len(data.targets) == 48
    assert {case.shape[0] for case in data.series} == {2}
    assert len({case.shape[1] for case in data.series}) > 1
    assert np.isnan(data.series[0]).sum() == 1

    path = tmp_path / "Bumps" / "Bumps_TEST.ts"
    (tmp_path / "Bumps_TEST.ts.gz").write_bytes(gzip.compress(path.read_bytes()))
    expected = read("Bumps", "test", str(tmp_path))
    path.unlink()
    got = read("Bumps", "test", str(tmp_path))
    assert list(got.targets) == list(expected.targets)
    np.testing.assert_array_equal(got.series[3], expected.series[3])

    make_dataset(tmp_path, "Sizes", regression=True)
    data = read("Sizes", "train", str(tmp_path))
    assert data.is_regression and data.targets.dtype == float
    with pytest.raises(FileNotFoundError, match="no Other_TRAIN.ts or Other_TRAIN.ts.gz in"):
        read("Other", "train", str(tmp_path))
    assert len(read("BasicMotions", "train").series) == 40


# ------------------------------------------------------------------------------- aeon


@parametrize_with_checks([EADCTransformerClassifier, EADCTransformerRegressor])
def test_aeons_checks(check):
    check()


EXAMPLE = Path(__file__).parent.parent / "examples" / "time_series"
FAST = {
    **SMALL,
    "n_estimators": 1,
    "n_epochs": 40,
    "batch_size": 8,
    "lr": 5e-3,
    "random_state": 1,
    "device": "cpu",
}


@pytest.mark.slow
def test_classifier_learns_saves_and_loads(tmp_path):
    make_dataset(tmp_path, "Bumps")
    train, test = (read("Bumps", split, str(tmp_path)) for split in ("train", "test"))
    state = torch.get_rng_state()
    classifier = EADCTransformerClassifier(**FAST).fit(train.series, train.targets)
    assert torch.equal(torch.get_rng_state(), state)
    assert classifier.score(test.series, test.targets) > 0.9
    assert list(classifier.classes_) == ["down", "up"]
    probabilities = classifier.predict_proba(test.series)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-9)
    one = [classifier.predict_proba([case])[0] for case in test.series[:5]]
    np.testing.assert_allclose(probabilities[:5], one, atol=1e-5)

    again = EADCTransformerClassifier(**FAST).fit(train.series, train.targets)
    np.testing.assert_array_equal(again.predict_proba(test.series), probabilities)

    classifier.save(tmp_path / "classifier.pt")
    loaded = EADCTransformerClassifier.load(tmp_path / "classifier.pt", device="cpu")
    np.testing.assert_array_equal(loaded.predict_proba(test.series), probabilities)
    assert (loaded.predict(test.series) == classifier.predict(test.series)).all()
    assert loaded.get_params() == classifier.get_params()
    # Where fairseq, which widens what torch loads, is not imported: options of numpy's types too.
    script = f"""
import numpy as np
from ea_aeon import EADCTransformerClassifier as C
C.load({str(tmp_path / "classifier.pt")!r})
X, y = np.random.default_rng(0).normal(size=(8, 1, 6)), np.array(["a", "b"] * 4)
small = dict(d_model=np.int64(16), ffn_dim=16, num_blocks=1, num_heads=2, attention_dim=4)
c = C(**small, lr=np.float64(0.01), n_epochs=1, random_state=np.int64(3)).fit(X, y)
c.save({str(tmp_path / "other.pt")!r})
again = C.load({str(tmp_path / "other.pt")!r})
assert again.random_state == 3 and (again.predict(X) == c.predict(X)).all()
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=ENVIRONMENT)

    with pytest.raises(ValueError, match="holds no EADCTransformerRegressor"):
        EADCTransformerRegressor.load(tmp_path / "classifier.pt")
    with pytest.raises(ValueError, match="channels"):
        loaded.predict(make_example_3d_numpy(n_channels=3, return_y=False))


@pytest.mark.slow
def test_regressor_learns_saves_and_loads(tmp_path):
    make_dataset(tmp_path, "Sizes", regression=True)
    train, test = (read("Sizes", split, str(tmp_path)) for split in ("train", "test"))
    regressor = EADCTransformerRegressor(**FAST).fit(train.series, train.targets)
    assert regressor.score(test.series, test.targets) > 0.7  # R²
    regressor.save(tmp_path / "regressor.pt")
    loaded = EADCTransformerRegressor.load(tmp_path / "regressor.pt", device="cpu")
    np.testing.assert_array_equal(loaded.predict(test.series), regressor.predict(test.series))


@pytest.mark.slow
def test_the_table_of_the_example(tmp_path):
    make_dataset(tmp_path, "Bumps", train=16, test=8)
    make_dataset(tmp_path, "Heights", regression=True, train=16, test=8)
    other = tmp_path / "other.json"
    other.write_text("{}")

    def run(*arguments):
        command = [sys.executable, EXAMPLE / "run.py", "--folder", tmp_path, "--epochs", 1]
        command += ["--option", "d_model=16", "--option", "attention_dim=8", *arguments]
        return subprocess.run(map(str, command), env=ENVIRONMENT, capture_output=True, text=True)

    scores = tmp_path / "scores.json"
    few = ["--json", scores, "--methods", "evolving", "plain", "1-NN DTW"]
    first = run(*few, "--seeds", 1, "--", "Bumps", "Heights").stdout
    number, seconds = r"\d\.\d{3}", r", \d+ s"
    assert re.search(rf"\| evolving \| {number}{seconds} \| {number}{seconds} \|", first)
    assert "| | Bumps, accuracy | Heights, RMSE |" in first
    both = run(*few, "--seeds", 1, 2, "--", "Bumps", "Heights").stdout
    assert "6 of 10 trainings were finished before" in both
    spread = rf"{number} ± {number}"
    assert re.search(rf"\| plain \| {spread}{seconds} \|", both)
    assert re.search(rf"\| evolving - plain \| [+-]{spread} \|", both)
    assert re.search(rf"\| 1-NN DTW \| {number}{seconds} \|", both)  # has no seed
    assert len(json.loads(scores.read_text())["records"]) == 10
    for arguments, message in (
        (["--", "Bumps", "None"], "no None_TRAIN.ts"),
        (["--json", tmp_path, "--", "Bumps"], "not a file that examples/time_series/run.py wrote"),
        (["--json", other, "--", "Bumps"], "not a file that examples/time_series/run.py wrote"),
        (
            ["--option", "kernel_size=a", "--", "Bumps"],
            "kernel_size must be a whole number of 1 or more, got 'a'",
        ),
        (
            ["--option", "class_weight=balanced", "--", "Bumps", "Heights"],
            "--option class_weight: Heights is a regression, which has no classes",
        ),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (1, "") and message in done.stderr
    assert other.read_text() == "{}"


def test_the_document_has_the_tables_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in ("run", "search", "jobs"):  # other examples have modules of the same names
        monkeypatch.delitem(sys.modules, name, raising=False)
    document = importlib.import_module("tables").document()
    for name in ("run", "search", "jobs", "tables"):
        del sys.modules[name]
    text = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    assert text == document, "run examples/time_series/tables.py"
    assert len(re.findall(r"^\| (evolving|convolutions|ROCKET|base) \|", text, re.MULTILINE)) == 4


def test_gradients_are_clipped():
    """Adam's first update does not depend on the gradient's size; its second does."""
    X, y = make_example_3d_numpy(n_cases=8, n_channels=1, n_timepoints=8, random_state=0)
    fitted = [
        EADCTransformerClassifier(
            **SMALL, n_epochs=2, batch_size=4, clip_norm=norm, device="cpu", random_state=1
        ).fit(X, y)
        for norm in (1e-12, 1e12)
    ]
    first, second = (list(one.network_.parameters()) for one in fitted)
    assert any(not torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_the_learning_rate_falls_along_a_cosine():
    X = np.random.default_rng(0).normal(size=(8, 2, 5))
    estimator = EADCTransformerClassifier(
        **SMALL, n_epochs=4, batch_size=4, lr=0.1, n_estimators=1, random_state=0
    )
    estimator.fit(X, np.array(list("abababab")))
    rates = [batch["event_lr"] for epoch in estimator.history_ for batch in epoch["batches"]]
    np.testing.assert_allclose(rates, 0.05 * (1 + np.cos(np.pi * np.arange(8) / 8)))


@pytest.mark.slow
def test_early_stopping_keeps_the_best_weights(tmp_path):
    make_dataset(tmp_path, "Bumps")
    train = read("Bumps", "train", str(tmp_path))
    train.targets[::5] = "down"  # nothing to be learned from
    options = {**FAST, "n_epochs": 60, "patience": 3, "lr": 0.02, "validation_fraction": 0.2}
    classifier = EADCTransformerClassifier(**options).fit(train.series, train.targets)
    losses = [epoch["valid_loss"] for epoch in classifier.history_]
    assert len(losses) < 60
    seed = int(np.random.RandomState(1).randint(2**31))
    _, validation = split_off(48, 0.2, seed, train.targets)
    cases = [train.series[index] for index in validation]
    probabilities = classifier.predict_proba(cases)
    picked = [
        probabilities[row, list(classifier.classes_).index(train.targets[index])]
        for row, index in enumerate(validation)
    ]
    assert -np.log(picked).mean() == pytest.approx(min(losses), rel=1e-4)
    options["validation_fraction"] = 0
    assert len(EADCTransformerClassifier(**options).fit(train.series, train.targets).history_) == 60


@pytest.mark.parametrize(
    "make",
    [
        lambda rng: rng.normal(size=(8, 1, 20)),  # one channel
        lambda rng: rng.normal(size=(8, 2, 1)),  # a single time step
        lambda rng: np.concatenate([rng.normal(size=(8, 1, 9)), np.ones((8, 1, 9))], axis=1),
        lambda rng: np.where(rng.random((8, 2, 9)) < 0.5, np.nan, rng.normal(size=(8, 2, 9))),
        lambda rng: [rng.normal(size=(2, n)) for n in (1, 2, 3, 30, 5, 6, 7, 8)],
    ],
)
@pytest.mark.parametrize("estimator", [EADCTransformerClassifier, EADCTransformerRegressor])
def test_unusual_series(estimator, make):
    X, y = make(np.random.default_rng(0)), np.array([0, 1] * 4)
    if estimator is EADCTransformerRegressor:
        y = np.linspace(-1, 1, 8)
    fitted = estimator(**{**FAST, "n_epochs": 2, "batch_size": 7}).fit(X, y)
    assert np.isfinite(np.asarray(fitted.predict(X), dtype=float)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_dim": 99}, "attention_dim must be less than d_model"),
        ({"n_epochs": 0}, "n_epochs must be a whole number of 1 or more, got 0"),
        ({"batch_size": 0}, "batch_size must be a whole number of 1 or more"),
        ({"patience": 0}, "patience must be a whole number of 1 or more"),
        ({"clip_norm": 0}, "clip_norm must be more than 0"),
        ({"lr": -1.0}, "lr must be more than 0, got -1.0"),
        ({"lr_schedule": "linear"}, "lr_schedule must be one of constant, cosine, got 'linear'"),
        ({"validation_fraction": 1.0}, "validation_fraction must lie in"),
        ({"n_estimators": 0}, "n_estimators must be a whole number of 1 or more, got 0"),
        ({"micro_batch_size": 0}, "micro_batch_size must be a whole number of 1 or more, got 0"),
        ({"n_epochs": True}, "n_epochs must be a whole number of 1 or more, got True"),
        ({"verbose": "yes"}, "verbose must be True, False or a number, got 'yes'"),
        ({"weight_decay": -1}, "weight_decay must be 0 or more, got -1"),
        ({"device": 3.5}, "device must be auto, cpu, or another that PyTorch has here (cuda, ...)"),
        ({"device": "gpu"}, "(cuda, ...), got 'gpu': Expected one of cpu, cuda"),
        ({"device": "meta"}, "(cuda, ...), got 'meta': "),
        ({"device": "xpu:9"}, "(cuda, ...), got 'xpu:9': "),
        ({"lr": 1e30, "validation_fraction": 0}, "training diverged"),
    ],
)
def test_bad_options_of_an_estimator_are_named(options, message):
    X, y = make_example_3d_numpy_list(n_cases=8, n_channels=2)
    with pytest.raises(ValueError, match=re.escape(message)):
        EADCTransformerClassifier(**{**FAST, **options}).fit(X, y)


# ------------------------------------------------------------------------------- using estimators

QUICK = {**SMALL, "num_blocks": 2, "n_epochs": 2, "n_estimators": 1, "device": "cpu"}


def fitted(X=None, y=None, **options):
    """A classifier that was trained a little."""
    if X is None:
        X, y = make_example_3d_numpy(n_cases=12, n_channels=2, n_timepoints=9, random_state=0)
    if y is None:
        y = np.arange(len(X)) % 2
    return EADCTransformerClassifier(**{**QUICK, "random_state": 1, **options}).fit(X, y)


def random_series(cases=12, channels=2, steps=9):
    return np.random.default_rng(0).normal(size=(cases, channels, steps))


def test_an_ensemble_averages_probabilities_or_numbers():
    X = random_series()
    classifier = fitted(n_estimators=3)
    lengths = torch.full((12,), 9)
    given = torch.stack(classifier.preparation_(X)), lengths
    members = [member(*given).softmax(dim=1) for member in classifier.network_.members]
    assert len({one[0, 0].item() for one in members}) == 3
    expected = torch.stack(members).mean(dim=0).detach().double().numpy()
    np.testing.assert_allclose(classifier.predict_proba(X), expected, atol=1e-6)
    assert [epoch["member"] for epoch in classifier.history_] == [0, 0, 1, 1, 2, 2]
    regressor = EADCTransformerRegressor(**{**QUICK, "n_estimators": 2, "random_state": 1})
    regressor.fit(X, np.arange(12.0))
    members = [member(*given) for member in regressor.network_.members]
    torch.testing.assert_close(regressor.network_(*given), (members[0] + members[1]) / 2)


def test_maps_of_an_estimator():
    """They are those of one network, alone and in a batch, whose padding is 0."""
    cases = [np.random.default_rng(i).normal(size=(2, steps)) for i, steps in enumerate((9, 6, 7))]
    classifier = fitted(n_estimators=2)
    maps = classifier.attention_maps(cases, member=1)
    assert [one.name for one in maps] == [
        f"blocks.{block}.{which}.attention" for block in range(2) for which in ("first", "second")
    ]
    for number, case in enumerate(cases):
        steps = case.shape[1]
        network = classifier.network_.members[1]
        with torch.no_grad(), collect_maps(network) as expected:
            network(torch.stack(classifier.preparation_([case])), torch.tensor([steps]))
        for one, alone in zip(maps, expected, strict=True):
            for found, right in zip(one[1:], alone[1:], strict=True):
                assert found.shape == (3, 2, 9, 9)
                torch.testing.assert_close(
                    found[number, :, :steps, :steps], right[0], atol=1e-5, rtol=1e-4
                )
                assert not found[number, :, steps:].any() and not found[number, :, :, steps:].any()
    assert not torch.equal(maps[0].attn_probs, classifier.attention_maps(cases)[0].attn_probs)
    figure = classifier.plot_maps(cases[1], layers=2, heads=2, member=1)
    drawn = [axes for axes in figure.findobj(Axes) if axes.images]
    assert len(drawn) == 4
    shown = drawn[1].images[0].get_array()
    np.testing.assert_allclose(shown, maps[0].attn_probs[1, 1, :6, :6], rtol=1e-4, atol=1e-6)
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_maps_of_an_estimator_that_there_are_not():
    X = random_series()
    classifier = fitted()
    for call, message in (
        (lambda: classifier.attention_maps(X, member=1), r"member must lie in \[0, 0\], got 1"),
        (lambda: classifier.plot_maps(X), "case must be one series"),
        (lambda: classifier.plot_maps(X[0, 0]), "channels"),
        (lambda: fitted(attention_dim=0).plot_maps(X[0]), "must have attentions"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(NotFittedError):
        EADCTransformerClassifier().plot_maps(X[0])
    one = fitted(X[:, :1]).plot_maps(X[0, 0])  # one channel needs no axis of its own
    assert one.findobj(Axes)


def test_defaults_are_the_same_everywhere():
    network = inspect.signature(DCTransformer).parameters
    estimator = EADCTransformerClassifier().get_params()
    fairseqs = vars(EADCTransformerConfig())
    renamed = {name: f"ea_{name}" for name in ("alpha", "beta", "learnable")}
    renamed["evolution_kernel_size"] = "ea_kernel_size"
    for name in NETWORK_OPTIONS:
        default = fairseqs[renamed.get(name, name)]
        assert estimator[name] == network[name].default == default, name
    assert estimator["differences"] == TimeSeriesConfig().differences


@pytest.mark.parametrize(
    ("updates", "epochs", "steps", "estimators"), [(8, 3, 9, 3), (2, 2, 10, 3), (2, 2, 11, 1)]
)
def test_default_numbers_of_epochs_and_networks(monkeypatch, updates, epochs, steps, estimators):
    monkeypatch.setattr("ea_aeon.estimators.EPOCHS", 2)
    monkeypatch.setattr("ea_aeon.estimators.UPDATES", updates)
    monkeypatch.setattr("ea_aeon.estimators.SHORT", 10)
    X = random_series(steps=steps)
    classifier = fitted(X, n_epochs=None, n_estimators=None, batch_size=4)  # 12 series
    assert (classifier.n_epochs_, classifier.n_estimators_) == (epochs, estimators)
    assert len(classifier.history_) == epochs * estimators
    given = classifier.get_params()
    assert (given["n_epochs"], given["n_estimators"]) == (None, None)


def test_parts_of_a_batch_add_up_to_its_gradients():
    """Without batch normalisation over the batch, they are the same up to rounding."""
    options = {**SMALL, "max_length": 9, "dropout": 0.0}
    gradients = []
    for size in (8, 3):
        torch.manual_seed(0)
        net = MicroBatchedNet(
            DCTransformer(2, 3, **options),
            criterion=torch.nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]), reduction="none"),
            micro_batch_size=size,
        ).initialize()
        for module in net.module_.modules():
            if isinstance(module, MaskedBatchNorm):
                module.forward = lambda x, exists: x
        batch = pad([case.float() for case in series(9, 4, 5, 6, 7, 8, 9, 3, channels=2)])
        step = net.train_step_single((batch, torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])))
        assert step["y_pred"].shape == (8, 3)
        gradients.append([step["loss"], *(p.grad for p in net.module_.parameters())])
    for whole, parts in zip(*gradients, strict=True):
        if whole is not None:
            torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_large_maps_are_named_and_their_gradients_computed_in_parts(monkeypatch):
    sizes = []
    part_step = MicroBatchedNet.part_step
    monkeypatch.setattr(
        MicroBatchedNet,
        "part_step",
        lambda self, *args: sizes.append(len(args[1])) or part_step(self, *args),
    )
    map_bytes = 4 * 2 * 9**2 * 2 * 2  # float32, heads, cells, layers in each of two blocks
    monkeypatch.setattr("ea_aeon.estimators.LARGE_MAPS", 5 * map_bytes)
    with pytest.warns(UserWarning, match="maps of 12 series of 9 steps .* 5 at a time"):
        fitted()
    assert set(sizes) == {5, 2}
    sizes.clear()
    with pytest.warns(UserWarning, match="maps of 6 series of 9 steps"):
        fitted(micro_batch_size=6)
    assert set(sizes) == {6}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*attention maps of")
        fitted(micro_batch_size=5)
        fitted(attention_dim=0)


def test_a_pickle_holds_weights_that_any_machine_loads(monkeypatch):
    classifier = fitted()
    classifier.network_.to("meta")  # a device other than the CPU
    monkeypatch.setattr(torch.nn.Module, "cpu", lambda self: self.to_empty(device="cpu"))
    loaded = pickle.loads(pickle.dumps(classifier))
    assert {p.device.type for p in loaded.network_.parameters()} == {"cpu"}
    assert {p.device.type for p in classifier.network_.parameters()} == {"meta"}


@pytest.mark.parametrize("n_estimators", [1, 2])
def test_a_pickle_predicts_the_same(n_estimators):
    classifier, X = fitted(n_estimators=n_estimators), random_series()
    loaded = pickle.loads(pickle.dumps(classifier))
    np.testing.assert_array_equal(loaded.predict_proba(X), classifier.predict_proba(X))
    assert pickle.loads(pickle.dumps(EADCTransformerClassifier())).get_params()["lr"] == 1e-3


def test_progress_in_a_notebook_without_widgets(monkeypatch, capsys):
    """skorch would choose tqdm's bar of ipywidgets in a notebook's kernel."""
    kernel = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setattr("builtins.get_ipython", lambda: kernel, raising=False)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    fitted(verbose=True)
    assert "train_loss" in capsys.readouterr().out


@pytest.mark.parametrize("validation_fraction", [0, 0.3])
def test_a_fitted_network_does_not_train_on(tmp_path, validation_fraction):
    X, classifier = random_series(), fitted(validation_fraction=validation_fraction)
    classifier.save(tmp_path / "classifier.pt")
    for one in (classifier, EADCTransformerClassifier.load(tmp_path / "classifier.pt")):
        assert not any(module.training for module in one.network_.modules())
        given = tuple(pad(one.preparation_([X[0], X[1][:, :4]])).values())
        before = one.network_(*given)
        with collect_maps(one.network_) as maps:
            one.network_(*given)
        assert len(maps) == 4 and torch.equal(one.network_(*given), before)
    with pytest.raises(TypeError, match="EADCTransformerClassifier.*network_"), collect_maps(one):
        pass


def test_fitting_on_a_cpu_leaves_gpus_alone(monkeypatch):
    devices = []
    fork_rng = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda x: devices.append(x) or fork_rng(x))
    state = torch.get_rng_state()
    fitted()
    assert devices == [[]] and torch.equal(torch.get_rng_state(), state)


def test_options_set_after_fit_do_not_change_what_was_fitted(tmp_path):
    X = random_series()
    classifier = fitted(n_estimators=2)
    expected = classifier.predict_proba(X)
    changed = {"d_model": 99, "num_heads": 3, "alpha": 0.9, "n_estimators": 1, "readout": "mean"}
    classifier.set_params(**changed, batch_size=5)
    np.testing.assert_allclose(classifier.predict_proba(X), expected, atol=1e-6)
    classifier.save(tmp_path / "classifier.pt")
    loaded = EADCTransformerClassifier.load(tmp_path / "classifier.pt", device="cpu")
    np.testing.assert_allclose(loaded.predict_proba(X), expected, atol=1e-6)
    assert loaded.get_params() == classifier.get_params()


def test_loading_to_a_device_that_is_missing(tmp_path):
    fitted().save(tmp_path / "classifier.pt")
    for name in ("gpu", "meta", "cuda:99"):
        with pytest.raises(ValueError, match=f"device must be .*, got '{name}': "):
            EADCTransformerClassifier.load(tmp_path / "classifier.pt", device=name)


def test_a_save_that_fails_leaves_the_file_before(tmp_path, monkeypatch):
    path = tmp_path / "classifier.pt"
    classifier = fitted()
    classifier.save(path)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda content, file: Path(file).write_text("a part") / 0)
        with pytest.raises(ZeroDivisionError):
            classifier.save(path)
    assert path.read_bytes() == before and [x.name for x in tmp_path.iterdir()] == [path.name]


def test_what_load_would_refuse_is_not_saved(tmp_path):
    path = tmp_path / "classifier.pt"
    days = np.array(["2026-01-01", "2026-01-02"], dtype="datetime64[D]")
    classifier = fitted(random_series(), days[np.arange(12) % 2])
    assert classifier.predict(random_series()).dtype == days.dtype
    with pytest.raises(ValueError, match=r"target, classes: datetime.date\(2026, 1, 1\) cannot"):
        classifier.save(path)
    with pytest.raises(ValueError, match=r"options, lr: Fraction\(1, 99\) cannot be saved"):
        fitted().set_params(lr=Fraction(1, 99)).save(path)
    assert not path.exists()
    moments = days.astype("datetime64[ns]")
    classifier = fitted(random_series(), moments[np.arange(12) % 2])
    classifier.save(path)
    loaded = EADCTransformerClassifier.load(path)
    assert (loaded.predict(random_series()) == classifier.predict(random_series())).all()


def test_files_of_an_earlier_version_are_named(tmp_path):
    path = tmp_path / "old.pt"
    torch.save({"estimator": "EADCTransformerClassifier", "options": {}, "weights": {}}, path)
    with pytest.raises(ValueError, match="old.pt was saved by an earlier version"):
        EADCTransformerClassifier.load(path)
    weights_before = build().state_dict()
    del weights_before["steps"]
    with pytest.raises(RuntimeError, match="saved by an earlier version"):
        build().load_state_dict(weights_before)


def test_threads_with_one_seed_fit_the_same_network():
    X = random_series()
    expected = fitted().predict_proba(X)
    with ThreadPoolExecutor(3) as pool:
        for one in pool.map(lambda _: fitted(), range(3)):
            np.testing.assert_array_equal(one.predict_proba(X), expected)


def test_another_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        classifier = fitted(class_weight="balanced", validation_fraction=0.3)
        assert classifier.predict_proba(random_series()).dtype == np.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in classifier.network_.parameters()} == {torch.float32}


def test_values_far_from_those_of_the_training_are_named():
    X = random_series()
    X[3, 1, 4] = 1e20
    with pytest.raises(ValueError, match=r"series 3 gives no finite prediction: .* up to 1e\+20"):
        fitted().predict(X)


@pytest.mark.parametrize("class_weight", ["balanced", {"a": 4.0, "b": 1.0}])
def test_class_weights_weigh_the_loss(class_weight):
    X, y = random_series(), np.array(list("aaabbbbbbbbb"))
    classifier = fitted(X, y, class_weight=class_weight, lr=1e-9, dropout=0.0, batch_size=12)
    weights = {"a": 4.0, "b": 1.0} if class_weight != "balanced" else {"a": 2.0, "b": 2 / 3}
    network = classifier.network_.train()  # normalises by the batch, as in training
    output = network(torch.stack(classifier.preparation_(X)), torch.full((12,), 9))
    losses = F.cross_entropy(output, torch.from_numpy((y == "b").astype(int)), reduction="none")
    expected = (losses * torch.tensor([weights[label] for label in y])).mean()
    assert classifier.history_[0]["train_loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert "class_weight" not in EADCTransformerRegressor().get_params()
    with pytest.raises(ValueError, match=r"class_weight names \['c'\], but the classes are .*'b'"):
        fitted(X, y, class_weight={"c": 1.0})
    with pytest.raises(ValueError, match="class_weight must be None, 'balanced' or a dict"):
        fitted(X, y, class_weight="even")
    for bad in ({"a": 1.0, "b": -1.0}, {"a": np.nan, "b": 1.0}, {"a": "1"}):
        with pytest.raises(ValueError, match="class_weight must hold numbers of 0 or more"):
            fitted(X, y, class_weight=bad)


def test_class_weights_are_by_label():
    """Strings that look like numbers are no numbers, and classes without a weight have 1."""
    X, y = random_series(), np.array(list("112" * 4))
    weights = fitted(X, y, class_weight={"2": 5.0}).weights_of_classes(y)
    assert weights.tolist() == [1.0, 5.0]
    weights = {"1": 2.0, "2": 5.0, "3": 9.0}  # a fold may lack a class
    assert fitted(X, y, class_weight=weights).weights_of_classes(y).tolist() == [2.0, 5.0]
    with pytest.raises(
        ValueError, match=r"class_weight names \[2\], but the classes are \['1', '2'\]"
    ):
        fitted(X, y, class_weight={2: 5.0})


def test_processes_may_share_a_file_of_scores(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.delitem(sys.modules, "jobs", raising=False)
    run = importlib.import_module("jobs").run
    del sys.modules["jobs"]
    path = tmp_path / "scores.json"

    def job(name, meanwhile=None):
        def train():
            if meanwhile is not None:
                run({meanwhile: job(meanwhile)}, key, path, "a script")
            return {"name": name, "score": 1.0}

        return train

    def key(record):
        return record["name"]

    assert len(run({"mine": job("mine", meanwhile="theirs")}, key, path, "a script")) == 1
    names = [record["name"] for record in json.loads(path.read_text())["records"]]
    assert sorted(names) == ["mine", "theirs"]


@pytest.mark.parametrize("labels", [np.array(list("ab")), np.array([3, 5])])
def test_what_fits_can_be_saved(tmp_path, labels):
    """Class weights by numpy's labels, and a device as an object."""
    X, y = random_series(), np.repeat(labels, 6)
    weights = dict(zip(np.unique(y), [1.0, 2.0], strict=True))
    classifier = fitted(X, y, class_weight=weights, device=torch.device("cpu"))
    classifier.save(tmp_path / "it.pt")
    again = EADCTransformerClassifier.load(tmp_path / "it.pt", device="cpu")
    assert again.class_weight == classifier.class_weight
    np.testing.assert_array_equal(again.predict(X), classifier.predict(X))
    with pytest.raises(FileNotFoundError, match="none/it.pt"):
        classifier.save(tmp_path / "none" / "it.pt")


def test_options_by_place_are_those_of_the_signature():
    for kind in (EADCTransformerClassifier, EADCTransformerRegressor):
        estimator = kind(32, 48)
        assert (estimator.d_model, estimator.ffn_dim) == (32, 48)
        assert list(inspect.signature(kind).parameters)[:2] == ["d_model", "ffn_dim"]


@pytest.mark.parametrize("batches", [0, 9])
def test_an_interrupted_fit_is_no_fit(monkeypatch, batches):
    calls = []

    def interrupt(cases):
        calls.append(cases)
        if len(calls) > batches:
            raise KeyboardInterrupt
        return collate(cases)

    monkeypatch.setattr("ea_aeon.estimators.collate", interrupt)
    X, y = make_example_3d_numpy_list(n_cases=20, n_channels=2)
    classifier = EADCTransformerClassifier(**FAST)
    with pytest.raises(KeyboardInterrupt):
        classifier.fit(X, y)
    assert not classifier.is_fitted


# ------------------------------------------------------------------------------- fairseq

NETWORK = [
    *("--d-model", 16, "--ffn-dim", 16, "--num-blocks", 2, "--num-heads", 2),
    *("--attention-dim", 4, "--lr", 5e-3, "--batch-size", 8, "--cpu", "--num-workers", 0),
    *("--log-format", "json"),
]


def task_of(folder, name):
    return ["--user-dir", USER_DIR, "--task", "time_series", "--dataset-name", name] + (
        ["--dataset-dir", folder] if folder else []
    )


def train(folder, name, save_dir, *options):
    arguments = [*task_of(folder, name), "--arch", "ea_dc_transformer", *NETWORK]
    return fairseq("train", *arguments, "--save-dir", save_dir, *options)


@pytest.mark.parametrize(("regression", "metric"), [(False, "accuracy"), (True, "rmse")])
@pytest.mark.slow
def test_fairseq_trains_resumes_and_validates_on_the_test_split(tmp_path, regression, metric):
    folder = make_dataset(tmp_path / "data", "Made", regression)
    train(folder, "Made", tmp_path / "a", "--max-epoch", 30)
    out = fairseq(
        "validate",
        *(*task_of(folder, "Made"), "--path", tmp_path / "a" / "checkpoint_best.pt"),
        *("--valid-subset", "test", "--cpu", "--log-format", "json"),
    )
    found = float(re.search(rf'"test_{metric}": "(.*?)"', out).group(1))
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(tmp_path / "a" / "checkpoint_best.pt")]
    )
    model.eval()
    data = read("Made", "test", str(folder))
    prepared = task.preparation(data.series)
    output = torch.cat([model(**pad([case])) for case in prepared]).detach()
    if regression:
        fitted = task.state.fitted
        predictions = output[:, 0].numpy() * fitted["target_std"] + fitted["target_mean"]
        expected = np.sqrt(np.mean((predictions - data.targets) ** 2))
        assert expected < 4  # their standard deviation is 5.8
    else:
        classes = np.array(task.state.fitted["classes"])
        expected = 100 * (classes[output.argmax(dim=1)] == data.targets).mean()
        assert expected > 90
    assert found == pytest.approx(expected, abs=0.01)

    train(folder, "Made", tmp_path / "b", "--max-epoch", 2)
    train(folder, "Made", tmp_path / "b", "--max-epoch", 4)
    train(folder, "Made", tmp_path / "c", "--max-epoch", 4)
    resumed, whole = (weights(tmp_path / x / "checkpoint_last.pt") for x in "bc")
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def test_fairseq_validates_in_half_precision(tmp_path):
    folder = make_dataset(tmp_path, "Made")
    train(folder, "Made", tmp_path / "a", "--max-epoch", 1)
    out = fairseq(
        "validate",
        *(*task_of(folder, "Made"), "--path", tmp_path / "a" / "checkpoint_best.pt"),
        *("--valid-subset", "test", "--cpu", "--log-format", "json", "--fp16"),
    )
    assert "test_accuracy" in out


@pytest.mark.slow
def test_fairseqs_shortest_command(tmp_path):
    """Only what names the task, the model and the data, and few epochs."""
    fairseq(
        "train",
        *(*task_of(None, "BasicMotions"), "--arch", "ea_dc_transformer", "--num-blocks", 1),
        *("--max-epoch", 1, "--save-dir", tmp_path),
    )
    saved = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "checkpoint_last.pt"))["cfg"]
    assert saved.criterion._name == "time_series" and saved.optimizer._name == "adam"
    assert saved.optimization.lr == [1e-3] and saved.dataset.batch_size == 16
    assert (saved.model.ea_alpha, saved.model.ea_beta) == (0.3, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ea-alpha", 2], "--ea-alpha must lie in"),
        (["--attention-dim", 3], "--attention-dim must be less than d_model"),
        (["--validation-fraction", 0], "leaves no case to validate"),
        (["--dataset-name", "???"], "--dataset-name is required"),
        (["--valid-subset", "dev"], "split must be train, valid or test, got 'dev'"),
    ],
)
def test_fairseq_names_bad_options(tmp_path, options, message):
    folder = make_dataset(tmp_path, "Made")
    with pytest.raises(ValueError, match=message):
        train(folder, "Made", tmp_path / "a", *options)


def test_fairseq_names_unseen_labels_and_other_channels(tmp_path):
    folder = make_dataset(tmp_path, "Made")
    train(folder, "Made", tmp_path / "a", "--max-epoch", 1)
    test = folder / "Made" / "Made_TEST.ts"
    text = test.read_text()

    def validate():
        fairseq(
            "validate",
            *(*task_of(folder, "Made"), "--path", tmp_path / "a" / "checkpoint_best.pt"),
            *("--valid-subset", "test", "--cpu"),
        )

    test.write_text(text.replace(":up", ":sideways").replace("down up", "down sideways"))
    with pytest.raises(ValueError, match="labels that the training split does not have: sideways"):
        validate()
    head, cases = text.split("@data\n")
    three = [line.split(":")[0] + ":" + line for line in cases.splitlines()]
    test.write_text(head + "@data\n" + "\n".join(three) + "\n")
    with pytest.raises(ValueError, match=r"must have shape \(2, steps\)"):
        validate()


def test_time_stamps_are_standardised():
    """They vary by far less than their mean; a constant channel has no scale."""
    stamps = 1.7e12 + np.arange(40).reshape(4, 1, 10) * 500.0
    rng = np.random.default_rng(0)
    for offset in (0.1, 7.3, 1e9 + 0.1, 1.7e18):
        series = np.concatenate([stamps, np.full_like(stamps, offset)], axis=1)
        found = Preparation.fit(list(series))
        assert found.std[1] == 1
        np.testing.assert_allclose(found.std[0], stamps.std(), rtol=1e-6)
        for case in found(list(series[rng.permutation(4)])):
            assert case.abs().max() < 2


def test_values_too_large_are_named():
    X = np.random.default_rng(0).normal(size=(4, 2, 9))
    with np.errstate(over="ignore"):
        with pytest.raises(ValueError, match="channel 1 has values too large"):
            Preparation.fit(list(X * [[1.0], [1e200]]))
        regressor = EADCTransformerRegressor(**SMALL, device="cpu")
        with pytest.raises(ValueError, match="y has values too large"):
            regressor.fit(X, np.array([1.0, 2.0, 3.0, 1e300]))


def test_a_validation_loss_that_is_never_finite_is_an_error():
    X, y = np.random.default_rng(0).normal(size=(12, 2, 9)), np.arange(12) % 2
    options = {**SMALL, "n_epochs": 3, "n_estimators": 1, "device": "cpu", "random_state": 1}
    classifier = EADCTransformerClassifier(**options, validation_fraction=0.3, patience=2)
    seed = int(np.random.RandomState(1).randint(2**31))
    _, held_out = split_off(12, 0.3, seed, y)
    X[held_out[0]] *= 1e25
    with pytest.raises(ValueError, match="validation_fraction holds out is never finite"):
        classifier.fit(X, y)


def test_maps_of_several_threads_do_not_mix():
    X, y = np.random.default_rng(0).normal(size=(6, 2, 60)), np.arange(6) % 2
    options = {**SMALL, "n_epochs": 1, "n_estimators": 1, "device": "cpu", "random_state": 1}
    classifier = EADCTransformerClassifier(**options).fit(X, y)
    expected = [classifier.attention_maps(X[i : i + 1]) for i in range(6)]
    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda i: classifier.attention_maps(X[i : i + 1]), [*range(6)] * 5)
    for number, maps in enumerate(found):
        assert len(maps) == len(expected[0])
        for ours, theirs in zip(maps, expected[number % 6], strict=True):
            torch.testing.assert_close(ours.attn_probs, theirs.attn_probs)


@pytest.mark.parametrize("text", ["1,2,3:a\n4,5,6:b\n", "@problemName x\n@classLabel true a\n"])
def test_a_file_without_series_is_refused(tmp_path, text):
    (tmp_path / "Bad_TRAIN.ts").write_text(text)
    with pytest.raises(ValueError, match="Bad_TRAIN.ts holds no series: .*after a line @data"):
        read("Bad", "train", str(tmp_path))
