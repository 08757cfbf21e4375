"""Maps of fairseq checkpoints for a sentence: translation models and RoBERTa."""

from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

import torch
from fairseq import checkpoint_utils, tasks
from fairseq.data import Dictionary
from fairseq.dataclass.configs import GenerationConfig
from fairseq.models import ARCH_MODEL_REGISTRY
from omegaconf import open_dict
from torch import Tensor, nn

import ea_fairseq  # noqa: F401 (registers the models, and lets fairseq load their checkpoints)
from ea_maps.measure import by_attention
from evolving_attention import AttentionMap, collect_maps

# Each attention's name in a picture, and in fairseq's modules.
ATTENTIONS = {
    "encoder": ("encoder.", "self_attn"),
    "decoder": ("decoder.", "self_attn"),
    "encoder-decoder": ("decoder.", "encoder_attn"),
}


class Checkpoint(NamedTuple):
    """A model of fairseq in evaluation mode, and the task with its dictionaries."""

    model: nn.Module
    task: tasks.FairseqTask


def load(path: Path, data: Optional[Path] = None) -> Checkpoint:
    """Loads a checkpoint; a plain model becomes ours with alpha = beta = 0.

    Args:
        data: folder of the dictionaries, if it has moved since the training.

    Raises:
        ValueError: the file is no checkpoint of a model that has an evolving counterpart.
        FileNotFoundError: there is no such file, or there are no dictionaries.
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
    except Exception as error:  # pickle, torch and fairseq may raise anything
        raise ValueError(f"{path} is no checkpoint of fairseq: {error!r}") from error
    if not name.startswith("ea_"):
        if f"ea_{name}" not in ARCH_MODEL_REGISTRY:
            raise ValueError(f"{path} holds {name}, which has no evolving counterpart")
        with open_dict(cfg):
            cfg.model._name = cfg.model.arch = f"ea_{name}"
            cfg.model.ea_alpha = cfg.model.ea_beta = 0.0
    try:
        task = tasks.setup_task(cfg.task)
        model = task.build_model(cfg.model)
    except Exception as error:  # fairseq may raise anything
        raise ValueError(
            f"{path} needs its dictionaries; if they are no longer in "
            f"{getattr(cfg.task, 'data', None)}, --data must name their folder: {error}"
        ) from error
    if task.source_dictionary is None:
        raise ValueError(f"{path} holds {name}, which does not read sentences")
    try:
        model.load_state_dict(state["model"], strict=True, model_cfg=cfg.model)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit the dictionaries in {cfg.task.data}; if these are not its own, "
            f"--data must name their folder: {error}"
        ) from error
    return Checkpoint(model.eval(), task)


def is_translation(checkpoint: Checkpoint) -> bool:
    """Whether the model has a decoder that reads the encoder's output; RoBERTa has none."""
    return hasattr(checkpoint.model, "decoder")


def encode(checkpoint: Checkpoint, text: str, target: bool = False) -> Tensor:
    """Tokens, with the end of sentence, of a text in the form of the training data.

    Raises:
        ValueError: none of the tokens is in the dictionary, or there are too many.
    """
    dictionary = checkpoint.task.target_dictionary if target else checkpoint.task.source_dictionary
    line = text if is_translation(checkpoint) else f"{dictionary[dictionary.bos()]} {text}"
    tokens = dictionary.encode_line(line, add_if_not_exist=False).long().unsqueeze(0)
    known = tokens[0, :-1].ne(dictionary.unk()) & tokens[0, :-1].ne(dictionary.bos())
    if not known.any():
        raise ValueError(
            f"none of the tokens of {text!r} is in the dictionary: the sentence must be tokenised "
            "and in BPE, like the training data"
        )
    most = checkpoint.model.max_positions()
    most = most[int(target)] if isinstance(most, tuple) else most
    if tokens.size(1) > most:
        raise ValueError(
            f"the model takes at most {most} tokens, the sentence has {tokens.size(1)}"
        )
    return tokens


def names_of(dictionary: Dictionary, tokens: Tensor) -> List[str]:
    return [dictionary[int(token)] for token in tokens[0]]


@torch.no_grad()
def translate(checkpoint: Checkpoint, source: Tensor) -> Tensor:
    """The model's own translation with beam 5: (1, tokens), ending with the end of sentence."""
    model, task = checkpoint
    generator = task.build_generator([model], GenerationConfig(beam=5))
    lengths = torch.tensor([source.size(1)])
    sample = {"net_input": {"src_tokens": source, "src_lengths": lengths}}
    return generator.generate([model], sample)[0][0]["tokens"].unsqueeze(0)


def maps_of(
    checkpoint: Checkpoint, source: Tensor, target: Optional[Tensor]
) -> Dict[str, List[AttentionMap]]:
    """The maps of one forward pass, by attention; `target` is None for an encoder."""
    model, _ = checkpoint
    with torch.no_grad(), collect_maps(model) as maps:
        if target is None:
            model(source, features_only=True)
        else:
            end = target[:, -1:]  # fairseq's decoder starts with the end of sentence
            lengths = torch.tensor([source.size(1)])
            model(source, lengths, torch.cat([end, target[:, :-1]], dim=1))
    return by_attention(maps, ATTENTIONS)


def axes_of(
    checkpoint: Checkpoint, source: Tensor, target: Optional[Tensor]
) -> Dict[str, Tuple[List[str], List[str]]]:
    """The tokens of the queries and of the keys of each attention's map.

    Those of a decoder are its input, which begins with the end of sentence.
    """
    _, task = checkpoint
    read = names_of(task.source_dictionary, source)
    axes = {"encoder": (read, read)}
    if target is not None:
        written = names_of(task.target_dictionary, target)
        fed = [written[-1], *written[:-1]]
        axes |= {"decoder": (fed, fed), "encoder-decoder": (fed, read)}
    return axes
