"""``python -m ea_maps sentence`` with checkpoints of transformers."""

import pytest
import torch
from transformers_models import OFF, evolving, plain, transformers

from ea_maps import huggingface
from ea_maps.__main__ import main

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

WORDS = ["[PAD]", "</s>", "[UNK]", *(f"w{i}" for i in range(57))]


def save(model, folder):
    """The model and a tokenizer that splits at spaces and ends each sentence with </s>."""
    model.save_pretrained(folder)
    words = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="</s>", unk_token="[UNK]"
    ).save_pretrained(folder)
    return folder


def run(*arguments):
    main([str(x) for x in arguments])


@pytest.mark.parametrize("host", ["bert", "roberta"])
def test_an_encoder(host, tmp_path, capsys):
    model = evolving(host, "ForSequenceClassification")
    ours = save(model, tmp_path / "ours")
    other = save(plain(host, "ForMaskedLM"), tmp_path / "plain")
    out, small = tmp_path / "maps.png", ("--layers", 2, "--heads", 2)
    run("sentence", ours, "w1 w2 w3", "--compare", other, *small, "--out", out)
    assert out.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("encoder, ") == 2
    checkpoint = huggingface.load(ours)
    source = huggingface.encode(checkpoint, "w1 w2 w3")
    read = ["w1", "w2", "w3", "</s>"]
    assert huggingface.axes_of(checkpoint, source, None) == {"encoder": (read, read)}
    maps = huggingface.maps_of(checkpoint, source, None)["encoder"]
    expected = model(source, output_attentions=True).attentions
    assert len(maps) == 3
    for found, probabilities in zip(maps, expected, strict=True):
        assert torch.equal(found.attn_probs, probabilities)
    assert huggingface.load(other).model.config.ea_alpha == 0


def test_a_translation(tmp_path, capsys):
    model = evolving("t5", "ForConditionalGeneration")
    model.generation_config.exponential_decay_length_penalty = (3, 9.0)  # it ends soon
    ours = save(model, tmp_path / "ours")
    other = save(plain("t5", "ForConditionalGeneration"), tmp_path / "plain")
    out = ("--out", tmp_path / "maps.png", "--layers", 2, "--heads", 2)
    run("sentence", ours, "w1 w2", "--target", "w4 w5 w6", "--compare", other, *out)
    assert "encoder-decoder, plain" in capsys.readouterr().out
    checkpoint = huggingface.load(ours)
    source = huggingface.encode(checkpoint, "w1 w2")
    target = huggingface.encode(checkpoint, "w4 w5 w6", target=True)
    read, fed = ["w1", "w2", "</s>"], ["[PAD]", "w4", "w5", "w6"]
    axes = huggingface.axes_of(checkpoint, source, target)
    assert axes == {"encoder": (read, read), "decoder": (fed, fed), "encoder-decoder": (fed, read)}
    maps = huggingface.maps_of(checkpoint, source, target)
    outputs = model(source, labels=target, output_attentions=True)
    for attention, expected in (
        ("encoder", outputs.encoder_attentions),
        ("decoder", outputs.decoder_attentions),
        ("encoder-decoder", outputs.cross_attentions),
    ):
        for found, probabilities in zip(maps[attention], expected, strict=True):
            torch.testing.assert_close(found.attn_probs, probabilities)
    written = huggingface.translate(checkpoint, source)
    best = model.generate(source, num_beams=5, max_new_tokens=200)
    assert torch.equal(written, best[:, 1:])
    assert written.size(1) < 20


@pytest.mark.parametrize("make", [evolving, plain])
@pytest.mark.parametrize("part", ["EncoderModel", "ForTokenClassification"])
def test_an_encoder_of_t5(part, make, tmp_path):
    checkpoint = huggingface.load(save(make("t5", part), tmp_path / "encoder"))
    assert not huggingface.is_translation(checkpoint)
    source = huggingface.encode(checkpoint, "w1 w2")
    assert list(huggingface.maps_of(checkpoint, source, None)) == ["encoder"]
    assert list(huggingface.axes_of(checkpoint, source, None)) == ["encoder"]


@pytest.mark.parametrize("make", [evolving, plain])
@pytest.mark.parametrize("part", ["ForSequenceClassification", "ForQuestionAnswering"])
def test_a_classifier_of_t5_reads_the_sentence_twice(part, make, tmp_path):
    model = make("t5", part)
    folder = save(model, tmp_path / "classifier")
    run("sentence", folder, "w1 w2", "--out", tmp_path / "maps.npz")
    checkpoint = huggingface.load(folder)
    source = huggingface.encode(checkpoint, "w1 w2")
    read, fed = ["w1", "w2", "</s>"], ["[PAD]", "w1", "w2"]
    axes = huggingface.axes_of(checkpoint, source, None)
    assert axes == {"encoder": (read, read), "decoder": (fed, fed), "encoder-decoder": (fed, read)}
    maps = huggingface.maps_of(checkpoint, source, None)
    outputs = model(source, output_attentions=True)
    for found, probabilities in zip(maps["encoder-decoder"], outputs.cross_attentions, strict=True):
        torch.testing.assert_close(found.attn_probs, probabilities)


def test_misuse_is_an_error(tmp_path):
    bert = save(evolving("bert", "Model", **OFF), tmp_path / "bert")
    electra = transformers.ElectraModel(
        transformers.ElectraConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1)
    )
    parts = save(plain("t5", "ForConditionalGeneration"), tmp_path / "parts")
    weights = safetensors.load_file(parts / "model.safetensors")
    weights = {name: x for name, x in weights.items() if "decoder.block.1" not in name}
    safetensors.save_file(weights, parts / "model.safetensors", {"format": "pt"})
    short = save(plain("bert", "Model", max_position_embeddings=8), tmp_path / "short")
    few = save(plain("bert", "Model", vocab_size=4), tmp_path / "few")
    t5 = save(plain("t5", "ForConditionalGeneration"), tmp_path / "t5")
    classifier = save(evolving("t5", "ForSequenceClassification"), tmp_path / "classifier")
    nameless = save(plain("bert", "Model"), tmp_path / "nameless")
    settings = nameless / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"unk_token": "[UNK]"', '"unk_token": null'))
    run("sentence", nameless, "w1 w2", "--out", tmp_path / "nameless.html")
    (tmp_path / "nameless.html").unlink()
    out = ("--out", tmp_path / "maps.png")
    for arguments, message in (
        ((tmp_path / "nowhere", "w1"), "there is no folder .*nowhere; as a name on the hub"),
        ((bert, " ".join(["w1"] * 9), "--compare", short), "short: .* takes at most 8 tokens"),
        ((bert, "w1 w2", "--compare", few), "few: the tokenizer has more words than the model"),
        ((bert, "w1", "--compare", t5), "only one of .*bert and .*t5 translates"),
        ((t5, "w1", "--compare", bert), "only one of .*t5 and .*bert translates"),
        ((bert, "x y"), "knows none of the words of 'x y'"),
        ((bert, " ".join(["w1"] * 48)), "takes at most 48 tokens, the sentence has 49"),
        ((bert, "w1", "--target", "w2"), "this model does not translate"),
        ((classifier, "w1", "--target", "w2"), "this model does not translate"),
        ((bert, "w1", "--data", tmp_path), "--data is for checkpoints of fairseq"),
        (
            (save(electra, tmp_path / "electra"), "w1"),
            "electra holds a model of type electra; it must be one of bert",
        ),
        ((parts, "w1"), "lacks .* weights of the model"),
    ):
        with pytest.raises(SystemExit, match=message):
            run("sentence", *arguments, *out)
    assert not list(tmp_path.glob("*.png"))


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    evolving("bert", "Model").save_pretrained(tmp_path / "ours")
    with pytest.raises(SystemExit, match=r"ours has none of the tokenizer's files .*; save it"):
        run("sentence", tmp_path / "ours", "w1 w2", "--out", tmp_path / "maps.png")
