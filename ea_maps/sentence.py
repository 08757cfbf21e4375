"""Maps of fairseq checkpoints, for a sentence: translation models and RoBERTa."""

from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

import torch
from fairseq import checkpoint_utils, tasks
from fairseq.data import Dictionary
from fairseq.dataclass.configs import GenerationConfig
from fairseq.models import ARCH_MODEL_REGISTRY
from omegaconf import open_dict
from torch import Tensor, nn

import ea_fairseq  # noqa: F401 (registers the models, and lets torch load their checkpoints)
from evolving_attention import AttentionMap, collect_maps

# What an attention is called in fairseq's modules, and in a picture.
ATTENTIONS = {
    "encoder": ("encoder.", "self_attn"),
    "decoder": ("decoder.", "self_attn"),
    "encoder-decoder": ("decoder.", "encoder_attn"),
}


class Checkpoint(NamedTuple):
    """A model of fairseq in evaluation mode, and the task that knows its dictionaries."""

    model: nn.Module
    task: tasks.FairseqTask


def load(path: Path, data: Optional[Path] = None) -> Checkpoint:
    """The checkpoint's model; that of a plain one as ours with alpha = beta = 0.

    Args:
        data: folder of the dictionaries, if it is no longer where the training had it.

    Raises:
        ValueError: no checkpoint of a model that could evolve.
        FileNotFoundError: no such file, or no dictionaries.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if data is not None and not data.is_dir():
        raise FileNotFoundError(f"--data: there is no folder {data}")
    overrides = None if data is None else {"data": str(data)}
    try:
        state = checkpoint_utils.load_checkpoint_to_cpu(str(path), overrides)
        cfg = state["cfg"]
        name = getattr(cfg.model, "_name", None) or cfg.model.arch
    except Exception as error:  # whatever pickle, torch or fairseq have against it
        raise ValueError(f"{path} is no checkpoint of fairseq: {error!r}") from error
    if not name.startswith("ea_"):
        if f"ea_{name}" not in ARCH_MODEL_REGISTRY:
            raise ValueError(f"{path} holds {name}, which there is no evolving model of")
        with open_dict(cfg):
            cfg.model._name = cfg.model.arch = f"ea_{name}"
            cfg.model.ea_alpha = cfg.model.ea_beta = 0.0
    try:
        task = tasks.setup_task(cfg.task)
        model = task.build_model(cfg.model)
    except Exception as error:  # whatever fairseq has against its folder
        raise ValueError(
            f"{path} needs its dictionaries; if they are not in {getattr(cfg.task, 'data', None)} "
            f"any longer, --data must name their folder: {error}"
        ) from error
    if task.source_dictionary is None:
        raise ValueError(f"{path} holds {name}, which reads no sentences")
    try:
        model.load_state_dict(state["model"], strict=True, model_cfg=cfg.model)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit its dictionaries, which --data must name if they are not those "
            f"in {cfg.task.data}: {error}"
        ) from error
    return Checkpoint(model.eval(), task)


def is_translation(checkpoint: Checkpoint) -> bool:
    """Whether the model has a decoder that reads the encoder's output; RoBERTa has none."""
    return hasattr(checkpoint.model, "decoder")


def encode(checkpoint: Checkpoint, text: str, target: bool = False) -> Tensor:
    """Tokens of a text that is in the form of the training data, with the end of sentence.

    Raises:
        ValueError: no token of it is in the dictionary.
    """
    dictionary = checkpoint.task.target_dictionary if target else checkpoint.task.source_dictionary
    line = text if is_translation(checkpoint) else f"{dictionary[dictionary.bos()]} {text}"
    tokens = dictionary.encode_line(line, add_if_not_exist=False).long().unsqueeze(0)
    known = tokens[0, :-1].ne(dictionary.unk()) & tokens[0, :-1].ne(dictionary.bos())
    if not known.any():
        raise ValueError(
            f"none of the tokens of {text!r} is in the dictionary: the sentence must be tokenised "
            "and in BPE as the training data is"
        )
    most = checkpoint.model.max_positions()
    most = most[int(target)] if isinstance(most, tuple) else most
    if tokens.size(1) > most:
        raise ValueError(
            f"the model takes {most} tokens at most, the sentence has {tokens.size(1)}"
        )
    return tokens


def names_of(dictionary: Dictionary, tokens: Tensor) -> List[str]:
    return [dictionary[int(token)] for token in tokens[0]]


@torch.no_grad()
def translate(checkpoint: Checkpoint, source: Tensor) -> Tensor:
    """The model's own translation, beam 5: (1, tokens), the end of sentence last."""
    model, task = checkpoint
    generator = task.build_generator([model], GenerationConfig(beam=5))
    lengths = torch.tensor([source.size(1)])
    sample = {"net_input": {"src_tokens": source, "src_lengths": lengths}}
    return generator.generate([model], sample)[0][0]["tokens"].unsqueeze(0)


def maps_of(
    checkpoint: Checkpoint, source: Tensor, target: Optional[Tensor]
) -> Dict[str, List[AttentionMap]]:
    """The maps of one forward pass, by attention; `target` None is an encoder alone."""
    model, _ = checkpoint
    with torch.no_grad(), collect_maps(model) as maps:
        if target is None:
            model(source, features_only=True)
        else:
            end = target[:, -1:]  # fairseq's decoder starts with the end of sentence
            lengths = torch.tensor([source.size(1)])
            model(source, lengths, torch.cat([end, target[:, :-1]], dim=1))
    sorted_maps = {
        attention: [x for x in maps if x.name.startswith(start) and x.name.endswith(end)]
        for attention, (start, end) in ATTENTIONS.items()
    }
    return {attention: found for attention, found in sorted_maps.items() if found}


def axes_of(
    checkpoint: Checkpoint, source: Tensor, target: Optional[Tensor]
) -> Dict[str, Tuple[List[str], List[str]]]:
    """The tokens at the queries and at the keys of each attention's map.

    A decoder's queries, and its keys, are what it has read: they begin with the end of sentence.
    """
    _, task = checkpoint
    read = names_of(task.source_dictionary, source)
    axes = {"encoder": (read, read)}
    if target is not None:
        written = names_of(task.target_dictionary, target)
        fed = [written[-1], *written[:-1]]
        axes |= {"decoder": (fed, fed), "encoder-decoder": (fed, read)}
    return axes
