"""ea_transformers: generation with T5, whose cached rows must give what teacher forcing gives."""

import pytest
import torch
from transformers_models import (
    EVOLVING,
    PAD,
    VARIANTS,
    evolving,
    inputs_for,
    plain,
    tokens,
    transformers,
)

HEAD = "ForConditionalGeneration"
LONG = {"max_new_tokens": 9, "min_new_tokens": 9}


def build(**options):
    return evolving("t5", HEAD, **options)


@pytest.fixture
def source():
    inputs = inputs_for("t5", "EncoderModel", left=True)
    return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}


def empty_cache():
    return transformers.EncoderDecoderCache(
        transformers.DynamicCache(), transformers.DynamicCache()
    )


def forced(model, source, target, **options):
    """Logits of the whole target at once, without a cache."""
    return model(**source, decoder_input_ids=target, use_cache=False, **options).logits


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("options", [*VARIANTS, {**EVOLVING, "ea_attentions": ["cross"]}])
def test_decoding_in_steps_equals_the_whole(source, options, left):
    """In steps of several tokens, also for a padded target."""
    model = build(**options)
    target = tokens(2, 10, seed=3)
    mask = torch.ones_like(target)
    if left:
        mask[1, :3] = 0
    expected = forced(model, source, target, decoder_attention_mask=mask)
    cache, steps, start = empty_cache(), [], 0
    for end in (1, 4, 5, 8, 10):
        outputs = model(
            **source,
            decoder_input_ids=target[:, start:end],
            decoder_attention_mask=mask[:, :end],
            cache=cache,
            use_cache=True,
        )
        cache, start = outputs.cache, end
        steps.append(outputs.logits)
    got = torch.cat(steps, dim=1)[mask.bool()]
    torch.testing.assert_close(got, expected[mask.bool()], rtol=0, atol=1e-5)


LONGER = {**EVOLVING, "ea_kernel_size": 5}
WAYS = [
    {},
    {"num_beams": 3},
    {"do_sample": True},
    {"do_sample": True, "num_beams": 2},
    {"num_beams": 4, "num_return_sequences": 3},
    {"cache_implementation": "static"},
    {"num_beams": 2, "cache_implementation": "static"},
    {"prompt_lookup_num_tokens": 3},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
]


@pytest.mark.parametrize(
    ("variant", "options"),
    [*((EVOLVING, way) for way in WAYS), (LONGER, {}), (LONGER, {"num_beams": 3})],
    ids=str,
)
def test_generation_with_a_cache_equals_generation_without(source, variant, options):
    model = build(**variant)
    if "prompt_lookup_num_tokens" in options:  # transformers decodes one sentence at a time
        source = {name: x[:1] for name, x in source.items()}
    without = {k: v for k, v in options.items() if "cache" not in k and "lookup" not in k}
    results = []
    for more in ({"use_cache": False, **without}, options):
        torch.manual_seed(0)
        results.append(
            model.generate(
                **source, **LONG, **more, output_logits=True, return_dict_in_generate=True
            )
        )
    expected, got = results
    assert torch.equal(got.sequences, expected.sequences)
    if "num_beams" not in options:
        logits, plain_logits = torch.stack(got.logits, 1), torch.stack(expected.logits, 1)
        torch.testing.assert_close(logits, plain_logits, rtol=0, atol=2e-5)
        whole = forced(model, source, got.sequences[:, :-1])
        torch.testing.assert_close(logits, whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("variant", "compiled"),
    [
        ({}, False),
        ({"ea_attentions": ["encoder", "cross"]}, False),
        ({"ea_attentions": ["encoder"]}, True),
        ({"ea_alpha": 0.0, "ea_beta": 0.0}, True),
    ],
)
def test_only_a_cache_without_rows_is_compiled(source, variant, compiled):
    """Rows grow, so transformers' own compilation for static caches would never end."""
    model = build(**{**EVOLVING, **variant})
    expected = model.generate(**source, **LONG)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    config = transformers.CompileConfig(backend=backend, fullgraph=True, mode=None, dynamic=False)
    config._compile_all_devices = True  # not only on a GPU
    static = {"cache_implementation": "static", "compile_config": config}
    assert torch.equal(model.generate(**source, **LONG, **static), expected)
    assert bool(graphs) == compiled


def test_generation_continues_a_target(source):
    model = build()
    target = torch.cat([torch.zeros(2, 1, dtype=torch.long), tokens(2, 4, seed=5)], dim=1)
    results = [
        model.generate(**source, decoder_input_ids=target, use_cache=use_cache, **LONG)
        for use_cache in (True, False)
    ]
    assert torch.equal(*results)
    assert torch.equal(results[0][:, :5], target)


@pytest.mark.parametrize("candidates", [3, 20])
def test_assisted_generation_is_greedy_generation(source, candidates):
    """An assistant that errs: its refused candidates are taken back from the rows.

    transformers has the assistant read the whole target again before the next candidates, so that
    more is taken back in every round.
    """
    model, assistant = build(), evolving("t5", HEAD, seed=1)
    source = {name: x[:1] for name, x in source.items()}
    length = {"max_new_tokens": 90, "min_new_tokens": 90}
    expected = model.generate(**source, **length)
    for helper in (assistant, plain("t5", HEAD)):
        helper.generation_config.num_assistant_tokens = candidates
        helper.generation_config.num_assistant_tokens_schedule = "constant"
        helper.generation_config.assistant_confidence_threshold = 0.0
        got = model.generate(**source, **length, assistant_model=helper)
        assert torch.equal(got, expected)


def test_the_cache_is_cropped_reordered_and_reset(source):
    model = build()
    target = tokens(2, 8, seed=3)

    def continued(cache, order, kept):
        """Logits for the last tokens with a cache of the first ones, and without one."""
        picked = {name: x[order] for name, x in source.items()}
        rest = model(
            **picked, decoder_input_ids=target[order, kept:], cache=cache, use_cache=True
        ).logits
        return rest, forced(model, picked, target[order])[:, kept:]

    def filled(length):
        inputs = {"decoder_input_ids": target[:, :length], "cache": empty_cache()}
        return model(**source, **inputs, use_cache=True).cache

    order = torch.tensor([1, 0])
    cases = []
    cache = filled(7)
    cache.crop(-3)
    cases.append((cache, torch.arange(2), 4))
    cache = filled(7)
    cache.crop(-7)
    cases.append((cache, torch.arange(2), 0))
    cache = filled(5)
    cache.reorder_cache(order)
    cases.append((cache, order, 5))
    cache = filled(5)
    cache.reset()
    cases.append((cache, torch.arange(2), 0))
    cache = filled(5)
    cache.batch_select_indices(torch.tensor([1]))
    cases.append((cache, torch.tensor([1]), 5))
    cache = filled(5)
    cache.batch_repeat_interleave(2)
    cases.append((cache, torch.tensor([0, 0, 1, 1]), 5))
    for cache, order, kept in cases:
        torch.testing.assert_close(*continued(cache, order, kept), rtol=0, atol=1e-5)

    # Beams copy only the rows that the next step reads.
    cache = filled(7)
    cache.reorder_cache(order)
    layers = [x for x in cache.self_attention_cache.layers if hasattr(x, "rows")]
    kept = [rows.size(2) for layer in layers for rows in layer.rows.values()]
    assert set(kept) == {2}
    with pytest.raises(ValueError, match="at most 0 tokens now.*before a reordering, got 1"):
        cache.crop(-1)

    # The tokens of the last 64 steps can be taken back: many of one step, then few.
    target = tokens(2, 80, seed=4)
    cache = filled(70)
    model(**source, decoder_input_ids=target[:, 70:72], cache=cache, use_cache=True)
    cache.crop(-69)
    torch.testing.assert_close(*continued(cache, torch.arange(2), 3), rtol=0, atol=1e-5)
    for count in (-64, -65):
        cache = filled(5)
        for step in range(5, 70):
            inputs = {"decoder_input_ids": target[:, step : step + 1], "cache": cache}
            model(**source, **inputs, use_cache=True)
        if count == -64:
            cache.crop(count)
            torch.testing.assert_close(*continued(cache, torch.arange(2), 6), rtol=0, atol=1e-5)
        else:
            with pytest.raises(ValueError, match="cropped by at most 64 tokens now.*got 65"):
                cache.crop(count)


@pytest.mark.parametrize("options", [{"ea_beta": 0.0}, {"ea_kernel_size": 1}])
def test_where_no_rows_are_read_a_cache_is_the_plain_one(source, options):
    model = build(**options)
    target = tokens(2, 71, seed=4)
    cache = empty_cache()
    for step in range(70):
        inputs = {"decoder_input_ids": target[:, step : step + 1], "cache": cache}
        model(**source, **inputs, use_cache=True)
    cache.crop(-69)
    assert not any(hasattr(layer, "rows") for layer in cache.self_attention_cache.layers)
    inputs = {"decoder_input_ids": target[:, 1:], "cache": cache}
    rest = model(**source, **inputs, use_cache=True).logits
    torch.testing.assert_close(rest, forced(model, source, target)[:, 1:], rtol=0, atol=1e-5)


def test_a_compiled_decoder_is_compiled_once(source):
    """Not once for each token. The rows that it keeps can be taken back."""
    model, graphs = build(), []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    step = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    target = tokens(2, 8, seed=3)
    encoder_outputs = model.encoder(**source)
    cache, counts = empty_cache(), []
    with torch.no_grad():
        for i in range(7):
            inputs = {"decoder_input_ids": target[:, i : i + 1], "cache": cache}
            mask = source["attention_mask"]
            step(encoder_outputs=encoder_outputs, attention_mask=mask, **inputs, use_cache=True)
            counts.append(len(graphs))
        assert counts[3] == counts[-1]
        cache.crop(-3)
        inputs = {"decoder_input_ids": target[:, 4:], "cache": cache}
        rest = model(**source, **inputs, use_cache=True).logits
        expected = forced(model, source, target)[:, 4:]
        torch.testing.assert_close(rest, expected, rtol=0, atol=1e-5)
    static = transformers.EncoderDecoderCache(
        transformers.StaticCache(model.config, max_cache_len=8), transformers.DynamicCache()
    )
    with pytest.raises(Exception, match="cache must be dynamic to be compiled or exported"):
        inputs = {"decoder_input_ids": target[:, :1], "cache": static}
        step(encoder_outputs=encoder_outputs, attention_mask=mask, **inputs, use_cache=True)


def test_transformers_own_export(source):
    exporters = pytest.importorskip("transformers.exporters")
    model = build()
    inputs = {**source, "decoder_input_ids": tokens(2, 5, seed=3)}
    config = exporters.DynamoConfig(dynamic=True)
    exported = exporters.DynamoExporter().export(model, dict(inputs), config=config)
    torch.testing.assert_close(exported(**inputs).logits, model(**inputs).logits)


def test_a_cache_keeps_the_form_of_the_plain_one(source):
    """One layer for each of the decoder, with keys and values of the same shapes."""
    target = tokens(2, 5, seed=3)
    for name in ("cache", "past_key_values"):  # transformers still takes the old name
        caches = [
            model(**source, decoder_input_ids=target, use_cache=True, **{name: empty_cache()}).cache
            for model in (plain("t5", HEAD), build())
        ]
        assert len(caches[0]) == len(caches[1]) == 3
        for expected, got in zip(*caches, strict=True):
            assert [getattr(x, "shape", x) for x in got] == [
                getattr(x, "shape", x) for x in expected
            ]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_a_decoder_of_another_depth_and_form(source, options):
    """As in T5 1.1 and Flan-T5, and with fewer layers than the encoder."""
    model = build(num_decoder_layers=2, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    without = {k: v for k, v in options.items() if "cache" not in k}
    expected = model.generate(**source, **LONG, **without, use_cache=False)
    assert torch.equal(model.generate(**source, **LONG, **options), expected)


def test_a_cache_without_rows_is_an_error(source):
    start = torch.full((2, 3), PAD)
    for attentions in (["decoder"], ["cross"]):
        cache = plain("t5", HEAD)(**source, decoder_input_ids=start, use_cache=True).cache
        with pytest.raises(ValueError, match="holds 3 tokens, but not the rows"):
            build(ea_attentions=attentions)(**source, decoder_input_ids=start[:, :1], cache=cache)
    cache = build()(**source, decoder_input_ids=start, use_cache=True).cache
    with pytest.raises(ValueError, match="decoder_attention_mask must cover the 3 tokens"):
        build()(
            **source,
            decoder_input_ids=start[:, :1],
            decoder_attention_mask=torch.ones(2, 1),
            cache=cache,
        )


def test_training_does_not_need_the_cache(source):
    """transformers fills a cache in training, too; its rows must not change the gradients."""
    model = build(ea_learnable=True)
    gradients = []
    for use_cache in (True, False):
        model.zero_grad()
        model(**source, labels=tokens(2, 6, seed=1), use_cache=use_cache).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for with_cache, without in zip(*gradients, strict=True):
        torch.testing.assert_close(with_cache, without, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [EVOLVING, {**EVOLVING, "ea_learnable": True}])
def test_weights_that_accelerate_has_offloaded(source, options):
    """It brings them when a module is called, and takes them away afterwards."""
    accelerate = pytest.importorskip("accelerate")
    model, target = build(**options), tokens(2, 8, seed=3)
    expected = forced(model, source, target)
    tokens_of_greedy_search = model.generate(**source, **LONG)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    evolution = model.decoder.block[1].layer[0].SelfAttention.evolution
    assert evolution.weight.is_meta
    outputs = model(**source, decoder_input_ids=target[:, :3], use_cache=True)
    rest = model(**source, decoder_input_ids=target[:, 3:], cache=outputs.cache, use_cache=True)
    assert evolution.weight.is_meta
    logits = torch.cat([outputs.logits, rest.logits], dim=1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert torch.equal(model.generate(**source, **LONG), tokens_of_greedy_search)
