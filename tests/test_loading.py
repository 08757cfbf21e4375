"""Weight files: alpha and beta travel with the weights; weights that stay fresh are reported."""

import copy
import io
import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from evolving_attention import AttentionEvolution
from evolving_attention.loading import StartsFromPlainWeights, adopt_options
from evolving_attention.modules import is_rounded, shortest_number


class Stack(StartsFromPlainWeights):
    """A user's own model of three layers, two of which evolve."""

    def __init__(self, alpha=0.5, beta=1.0, adopts=(), **options):
        super().__init__()
        self.query = nn.Linear(8, 8)
        self.evolutions = nn.ModuleDict(
            {
                f"layer{i}": nn.ModuleDict({"evolution": evolution(alpha, beta, **options)})
                for i in (1, 2)
            }
        )
        self.adopts = adopts

    def _load_from_state_dict(self, state_dict, prefix, *args):
        adopt_options(self, self.adopts, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def evolution(alpha=0.5, beta=1.0, **options):
    return AttentionEvolution(2, alpha, beta, **options)


def halve(module):
    prune.l1_unstructured(module, "weight", 0.5)
    prune.l1_unstructured(module, "bias", 0.5)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("made", "saved", "message"),
    [
        ((0.1, 0.2), (0.5, 0.2), "alpha is 0.5 in the checkpoint.*made with alpha=0.1"),
        ((0.1, 0.2), (0.1, 0.3), "beta is 0.3 in the checkpoint.*made with beta=0.2"),
        ((0.1, 0.2), (0.1, 0.2001), "beta is 0.2001 in the checkpoint"),
        ((0.1, 0.0), (0.0, 0.0), r"alpha is 0.0 in the checkpoint"),
    ],
)
def test_other_numbers_than_the_files_are_refused(made, saved, message, strict):
    state = through_a_file(evolution(*saved).state_dict())
    with pytest.raises(RuntimeError, match=message):
        evolution(*made).load_state_dict(state, strict=strict)


@pytest.mark.parametrize("number", [0.0, 1e-7, 0.1, 0.2001, 1 / 3, 0.7, 1.0])
@pytest.mark.parametrize("way", ["as it is", "half", "bfloat16", "double", "half, then float"])
def test_the_same_numbers_load_in_every_precision(number, way):
    """A file in half precision leaves no rounding errors in alpha and beta."""
    source = evolution(number, 1 - number)
    for step in way.split(", then "):
        getattr(source, step, lambda: None)()
    state = through_a_file(source.state_dict())
    model = evolution(number, 1 - number)
    model.load_state_dict(state)
    assert model.alpha == torch.tensor(number)
    assert model.mixing == (number, 1 - number)


def test_files_of_before_alpha_and_beta_were_in_them_load():
    source, model = evolution(0.3, 0.4), evolution(0.3, 0.4)
    state = source.state_dict()
    del state["alpha"], state["beta"]
    assert not any(model.load_state_dict(state, strict=False))
    model.load_state_dict(state)
    learnable = evolution(0.3, 0.4, learnable=True)
    learnable.load_state_dict(state)
    for loaded in (model, learnable):
        torch.testing.assert_close(dict(loaded.state_dict()), dict(source.state_dict()))


def test_learned_numbers():
    learned = evolution(0.3, 0.4, learnable=True)
    with torch.no_grad():
        learned.alpha.fill_(0.25)
    state = through_a_file(learned.state_dict())
    again = evolution(0.0, 0.0, learnable=True)
    again.load_state_dict(state)
    assert again.alpha == 0.25
    with pytest.raises(RuntimeError, match="alpha is 0.25 in the checkpoint.*learnable=True"):
        evolution(0.3, 0.4).load_state_dict(state)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("change", [halve, weight_norm])
def test_changed_convolutions_load_their_own_weights(change, beta):
    model = evolution(0.0, beta, learnable=True)
    change(model)
    state = through_a_file(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model.load_state_dict(state)
    torch.testing.assert_close(dict(model.state_dict()), dict(state))


def test_a_model_without_convolution_learns_on():
    """From its own function, with a convolution that is as it was before loading."""
    trained, model = evolution(0.3, 0.0), evolution(0.7, 0.6, learnable=True)
    before = model.weight.detach().clone()
    model.load_state_dict(through_a_file(trained.state_dict()))
    assert torch.equal(model.weight, before) and model.weight.requires_grad
    assert (model.alpha, model.beta) == (torch.tensor(0.3), 0)
    maps = torch.randn(2, 1, 2, 5, 5)
    torch.testing.assert_close(model(*maps), trained(*maps))
    state = evolution(0.3, 0.4).state_dict()
    del state["weight"], state["bias"]
    with pytest.raises(RuntimeError, match="Missing key.*weight"):
        model.load_state_dict(state)


def test_numbers_survive_copies_averages_and_to_empty():
    model = evolution(0.1, 0.7)
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(model)
    model.load_state_dict(averaged.module.state_dict())
    model.load_state_dict(copy.deepcopy(model).state_dict())
    with torch.device("meta"):
        empty = evolution(0.1, 0.7)
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    assert empty.alpha == torch.tensor(0.1)
    with torch.device("meta"):
        empty = evolution(0.1, 0.7)
    old = {name: x for name, x in model.state_dict().items() if name not in ("alpha", "beta")}
    empty.load_state_dict(old, assign=True)
    assert empty.alpha == torch.tensor(0.1)


def test_the_default_device_does_not_matter():
    model = evolution(0.1, 0.7)
    with torch.device("meta"):
        model.load_state_dict(model.state_dict())
        empty = evolution(0.1, 0.7)
        empty.load_state_dict(model.state_dict(), assign=True)
    assert {x.device.type for x in empty.state_dict().values()} == {"cpu"}
    assert empty.beta == torch.tensor(0.7)


def test_plain_weights_leave_one_warning(caplog):
    plain = {name: x for name, x in Stack().state_dict().items() if name.startswith("query")}
    model = Stack()
    before = copy.deepcopy(model.state_dict())
    model.load_state_dict(plain)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "4 weights of Stack are not in the checkpoint" in record.getMessage()
    assert torch.equal(model.query.weight, plain["query.weight"])
    for name, value in model.state_dict().items():
        assert torch.equal(value, plain.get(name, before[name])), name


def test_plain_weights_of_a_model_without_convolution_leave_one_warning(caplog):
    model = Stack(alpha=0.5, beta=0.0)
    plain = {name: x for name, x in model.state_dict().items() if "evolution" not in name}
    model.load_state_dict(model.state_dict())
    Stack(alpha=0.0, beta=0.0).load_state_dict(plain)  # nothing evolves
    assert not caplog.records
    model.load_state_dict(plain)
    (record,) = caplog.records
    assert "but in this Stack maps evolve with alpha=0.5, beta=0.0" in record.getMessage()


@pytest.mark.parametrize("state", [{}, {"query.weight": torch.ones(8, 8)}])
def test_what_is_missing_is_said_without_strict(state, caplog):
    missing, unexpected = Stack().load_state_dict(state, strict=False)
    fresh = {f"evolutions.layer{i}.evolution.{x}" for i in (1, 2) for x in ("weight", "bias")}
    assert set(missing) == (fresh | {"query.weight", "query.bias"}) - state.keys()
    assert not unexpected
    assert not caplog.records


def test_part_of_an_evolution_is_refused():
    state = Stack().state_dict()
    del state["evolutions.layer2.evolution.weight"], state["evolutions.layer2.evolution.bias"]
    with pytest.raises(RuntimeError, match="Missing.*evolutions.layer2.evolution.weight"):
        Stack().load_state_dict(state)


def test_a_container_does_not_load_in_silence(caplog):
    pair = nn.ModuleList([Stack(), Stack()])
    state = {name: x for name, x in pair.state_dict().items() if not name.startswith("1.evo")}
    with pytest.raises(RuntimeError, match="Missing.*1.evolutions.layer1.evolution.weight"):
        nn.ModuleList([Stack(), Stack()]).load_state_dict(state)
    missing, _ = nn.ModuleList([Stack(), Stack()]).load_state_dict(state, strict=False)
    assert len(missing) == 4


@pytest.mark.parametrize(
    "saved",
    [
        dict(alpha=0.1, beta=0.2),
        dict(alpha=0.1, beta=0.0),
        dict(alpha=0.0, beta=0.0),
        dict(alpha=0.1, beta=0.2, kernel_size=5),
        dict(alpha=1 / 3, beta=1.0, kernel_size=1),
        dict(alpha=0.1, beta=0.2, learnable=True),
    ],
)
def test_options_are_adopted(saved, caplog):
    caplog.set_level("INFO")
    source, model = Stack(**saved), Stack(adopts=("alpha", "beta", "kernel_size"))
    parameters = dict(model.named_parameters())
    model.load_state_dict(through_a_file(source.state_dict()))
    maps = torch.randn(2, 3, 2, 5, 5).unbind()
    for i in (1, 2):
        ours, theirs = (m.evolutions[f"layer{i}"]["evolution"] for m in (model, source))
        torch.testing.assert_close(ours(*maps[:2]), theirs(*maps[:2]))
        assert ours.mixing == pytest.approx((saved["alpha"], saved["beta"]))
        assert ours.kernel_size == theirs.kernel_size
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]  # as an optimiser knows it
    assert "as in the checkpoint" in caplog.text
    model.load_state_dict(model.state_dict())


def test_options_that_were_given_are_not_adopted():
    model = Stack(alpha=0.5, adopts=("beta",))
    with pytest.raises(RuntimeError, match="alpha is 0.1 in the checkpoint"):
        model.load_state_dict(Stack(alpha=0.1, beta=0.2).state_dict())
    model = Stack(adopts=("alpha", "beta"))
    with pytest.raises(RuntimeError, match="kernel_size=5, but this model .* kernel_size=3"):
        model.load_state_dict(Stack(kernel_size=5).state_dict())


def test_another_number_of_heads_is_named():
    message = r"weight was trained with num_heads=2, but this model was made with num_heads=4"
    with pytest.raises(RuntimeError, match=message):
        AttentionEvolution(4, 0.5, 1.0).load_state_dict(evolution().state_dict())


@pytest.mark.parametrize("number", [0.1, 0.25, 1 / 3, 0.123456789, 0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_shortest_number(number, dtype):
    stored = torch.tensor([number], dtype=dtype)
    assert is_rounded(number, stored)
    assert is_rounded(shortest_number(stored), stored)
    if number in (0.1, 0.25):
        assert shortest_number(stored) == number


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.99, 0.9998, 0.9999, 0.99999])
def test_moving_averages_of_half_precision_are_the_same_model(dtype, decay):
    """fairseq averages in float32 and loads the average into the model at each update."""
    numbers = [number / 20 for number in range(21)]
    layers = [AttentionEvolution(2, number, number).to(dtype) for number in numbers]
    averages = torch.stack([layer.alpha for layer in layers]).float()
    for _ in range(4000):
        averages.mul_(decay).add_(torch.stack([x.alpha for x in layers]), alpha=1 - decay)
    for layer, average in zip(layers, averages, strict=True):
        layer.load_state_dict({**layer.state_dict(), "alpha": average, "beta": average})
    other = {**layers[2].state_dict(), "alpha": torch.tensor([0.11])}
    with pytest.raises(RuntimeError, match="alpha is 0.11 in the checkpoint"):
        layers[2].load_state_dict(other)
