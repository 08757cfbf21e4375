"""ea_transformers: Trainer, torch.compile and export, LoRA, and training on several processes."""

import importlib.util
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers_models import (
    EVOLVING,
    ea_transformers,
    evolving,
    inputs_for,
    tokens,
    transformers,
)

from evolving_attention import AttentionEvolution

needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed"
)
LORA_TARGETS = {"bert": ["query", "value"], "t5": ["q", "v"]}
TRAINED = (("bert", "ForTokenClassification"), ("t5", "ForConditionalGeneration"))


class Sentences(torch.utils.data.Dataset):
    """Sentences whose first token decides their class."""

    def __init__(self, count, length=7):
        self.tokens = tokens(count, length)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        row = self.tokens[index]
        return {"input_ids": row, "labels": (row[0] % 2).item()}


def trainer(model, folder, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        max_steps=6,
        save_steps=3,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **options,
    )
    return transformers.Trainer(
        model, arguments, train_dataset=Sentences(48), eval_dataset=Sentences(16)
    )


@needs_accelerate
@pytest.mark.parametrize("host", ["bert", "roberta"])
def test_trainer_trains_and_resumes(host, tmp_path):
    """An interrupted run ends with the weights of an uninterrupted one."""

    def run(folder, **options):
        model = evolving(host, "ForSequenceClassification", ea_learnable=True)
        return trainer(model, folder, **options)

    whole = run(tmp_path / "whole")
    start = {name: x.clone() for name, x in whole.model.named_parameters()}
    whole.train()
    losses = [x["loss"] for x in whole.state.log_history if "loss" in x]
    assert len(losses) == 6 and all(0 < loss < 5 for loss in losses)
    changed = [name for name, x in whole.model.named_parameters() if not x.equal(start[name])]
    assert any("evolution.weight" in name for name in changed)
    assert any("evolution.alpha" in name for name in changed)

    resumed = run(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    for (name, x), other in zip(
        whole.model.named_parameters(), resumed.model.parameters(), strict=True
    ):
        torch.testing.assert_close(other, x, rtol=0, atol=1e-6, msg=name)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "whole/checkpoint-6"
    )
    batch = tokens(2, 7)
    whole.model.eval()
    torch.testing.assert_close(loaded(batch).logits, whole.model(batch).logits, rtol=0, atol=1e-6)


@needs_accelerate
def test_trainer_with_checkpointing_and_the_best_model(tmp_path):
    model = evolving("bert", "ForSequenceClassification")
    run = trainer(model, tmp_path, gradient_checkpointing=True, load_best_model_at_end=True)
    run.train()
    assert run.state.best_model_checkpoint is not None
    assert run.evaluate()["eval_loss"] > 0


@needs_accelerate
def test_seq2seq_trainer_generates(tmp_path):
    model = evolving("t5", "ForConditionalGeneration")
    arguments = transformers.Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        max_steps=2,
        predict_with_generate=True,
        generation_max_length=6,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    rows = [{"input_ids": x, "labels": x[:5]} for x in tokens(16, 7)]
    run = transformers.Seq2SeqTrainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    run.train()
    assert run.predict(rows).predictions.shape[0] == 16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "head"), [("bert", "ForSequenceClassification"), ("t5", "ForConditionalGeneration")]
)
def test_compiled_models_compute_the_same(host, head):
    """Values and gradients, without a break in the graph."""
    torch._dynamo.reset()
    model = evolving(host, head, ea_learnable=True)
    inputs = inputs_for(host, head)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        logits = run(**inputs, use_cache=False).logits if host == "t5" else run(**inputs).logits
        logits.square().sum().backward()
        gradients.append(
            [logits, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        )
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("host", ["bert", "t5"])
def test_exported_models_take_any_batch_and_length(host):
    head = "EncoderModel" if host == "t5" else "ForSequenceClassification"
    model = evolving(host, head)
    inputs = inputs_for(host, head)
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", max=40)
    shapes = {name: {0: batch, 1: length} for name in inputs}
    exported = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
    other = inputs_for(host, head, batch=3, length=12, left=True)
    expected, got = model(**other), exported.module()(**other)
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("host", "head"), [("bert", "ForSequenceClassification"), ("t5", "ForConditionalGeneration")]
)
def test_lora_with_the_evolution_trained_too(host, head, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = evolving(host, head)
    inputs = inputs_for(host, head)
    before = base(**inputs).logits
    config = peft.LoraConfig(
        target_modules=LORA_TARGETS[host], modules_to_save=["evolution"], init_lora_weights=False
    )
    model = peft.get_peft_model(base, config)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("evolution" in name for name in trained)
    assert all("lora_" in name or "evolution" in name for name in trained)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model.train()
    model(**inputs).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    optimizer.step()
    model.eval()
    after = model(**inputs).logits
    assert not after.allclose(before)
    if host == "t5":
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 2}
        source = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        results = [model.generate(**source, **options, use_cache=x) for x in (True, False)]
        assert torch.equal(*results)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(evolving(host, head), tmp_path).eval()
    torch.testing.assert_close(again(**inputs).logits, after)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, after, rtol=0, atol=1e-5)
    assert any(type(m) is AttentionEvolution for m in merged.modules())


def train_in_process(rank, port, folder):
    """One process of two: for each model and kind, a step on its half of the batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))
    for host, head in TRAINED:
        for kind in ("ddp", "fsdp"):
            model = without_dropout(evolving(host, head, ea_learnable=True)).train()
            inputs = {name: x[2 * rank : 2 * rank + 2] for name, x in batch_of(host, head).items()}
            if kind == "ddp":
                trained = DistributedDataParallel(model)
            else:
                for module in model.modules():
                    if type(module).__name__ in model._no_split_modules:
                        fully_shard(module, mesh=mesh)
                trained = fully_shard(model, mesh=mesh)
            step(trained, inputs)
            weights = {
                name: x.full_tensor() if hasattr(x, "full_tensor") else x
                for name, x in model.state_dict().items()
            }
            if rank == 0:
                torch.save(weights, f"{folder}/{host}-{kind}.pt")
    dist.destroy_process_group()


def step(model, inputs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**inputs).logits.square().mean().backward()
    optimizer.step()


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


def batch_of(host, head):
    parts = [inputs_for(host, head, seed=seed) for seed in (0, 1)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    """With DDP and with FSDP2, whose units are the layers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(train_in_process, (port, str(tmp_path)), nprocs=2)
    for host, head in TRAINED:
        model = without_dropout(evolving(host, head, ea_learnable=True)).train()
        step(model, batch_of(host, head))
        for kind in ("ddp", "fsdp"):
            got = torch.load(tmp_path / f"{host}-{kind}.pt")
            for name, expected in model.state_dict().items():
                torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-5, msg=name)


def test_options_of_the_configuration_reach_every_layer():
    model = ea_transformers.EABertModel(
        ea_transformers.EABertConfig(num_hidden_layers=3, **EVOLVING)
    )
    found = [m.extra_repr() for m in model.modules() if isinstance(m, AttentionEvolution)]
    assert found == ["12, kernel_size=3, window='bidirectional', alpha=0.3, beta=0.4"] * 2
