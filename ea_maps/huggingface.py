"""Maps of transformers' checkpoints for a sentence: BERT, RoBERTa and T5.

The functions are those of :mod:`ea_maps.sentence`, for a folder in place of a file.
"""

from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, logging

import ea_transformers
from ea_maps.measure import by_attention
from evolving_attention import AttentionMap, collect_maps

MODELS = {
    "bert": ea_transformers.EABertModel,
    "roberta": ea_transformers.EARobertaModel,
    "t5": ea_transformers.EAT5ForConditionalGeneration,
}
# The classes of T5 that write no text. In the second group, the decoder reads the sentence itself.
ENCODERS = (ea_transformers.EAT5EncoderModel, ea_transformers.EAT5ForTokenClassification)
CLASSIFIERS = (
    ea_transformers.EAT5ForSequenceClassification,
    ea_transformers.EAT5ForQuestionAnswering,
)
# Each attention's name in a picture, and in transformers' modules.
ATTENTIONS = {
    "encoder": ("encoder.", ("SelfAttention", ".self")),
    "decoder": ("decoder.", ("SelfAttention",)),
    "encoder-decoder": ("decoder.", ("EncDecAttention",)),
}


class Checkpoint(NamedTuple):
    """A model of transformers in evaluation mode, and its tokenizer."""

    model: Any
    tokenizer: Any


def load(path: Path, data: Optional[Path] = None) -> Checkpoint:
    """Loads a checkpoint; a plain model becomes ours with alpha = beta = 0.

    Args:
        path: folder of the model and its tokenizer, or their name on the Hugging Face hub.
        data: must be None.

    Raises:
        ValueError: the model has no evolving counterpart, or some of its weights are missing.
        OSError: there is no such folder or name, or something is missing in it.
    """
    if data is not None:
        raise ValueError("--data is for checkpoints of fairseq, which are files")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        if Path(path).is_dir():
            raise
        raise OSError(f"there is no folder {path}; as a name on the hub: {error}") from error
    host = config.model_type.removeprefix("ea_")
    if host not in MODELS:
        raise ValueError(
            f"{path} holds a model of type {host}; it must be one of {', '.join(MODELS)}"
        )
    model_class = MODELS[host]
    for reader in (*ENCODERS, *CLASSIFIERS):
        if reader.__name__.removeprefix("EA") in str(config.architectures):
            model_class = reader
    evolving = config.model_type.startswith("ea_")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # heads that draw nothing are left out
    try:
        model, info = model_class.from_pretrained(
            path, output_loading_info=True, **{} if evolving else {"ea_alpha": 0.0, "ea_beta": 0.0}
        )
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} weights of the model: {missing[0]}, ...")
    return Checkpoint(model.eval(), tokenizer_of(path))


def tokenizer_of(path: Path) -> Any:
    """The tokenizer beside the model; transformers makes an empty one if its files are missing."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    names = tokenizer.vocab_files_names.values()
    if names and Path(path).is_dir() and not any((Path(path) / name).exists() for name in names):
        raise FileNotFoundError(
            f"{path} has none of the tokenizer's files {', '.join(names)}; save it there: "
            f"AutoTokenizer.from_pretrained(NAME).save_pretrained({str(path)!r})"
        )
    return tokenizer


def is_translation(checkpoint: Checkpoint) -> bool:
    """Whether the model writes text; an encoder does not."""
    return checkpoint.model.can_generate()


def encode(checkpoint: Checkpoint, text: str, target: bool = False) -> Tensor:
    """Token ids of a text, with the tokenizer's special tokens, (1, tokens).

    Raises:
        ValueError: none of the words is known, or there are too many.
    """
    model, tokenizer = checkpoint
    texts = {"text_target" if target else "text": text}
    tokens = tokenizer(**texts, return_tensors="pt").input_ids
    unknown = [] if tokenizer.unk_token_id is None else [tokenizer.unk_token_id]
    special = torch.tensor([*tokenizer.all_special_ids, *unknown], dtype=torch.long)
    if torch.isin(tokens, special).all():
        raise ValueError(f"the tokenizer knows none of the words of {text!r}")
    if tokens.max() >= model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has more words than the model, whose vocab_size is "
            f"{model.config.vocab_size}"
        )
    most = most_tokens(model.config)
    if most is not None and tokens.size(1) > most:
        raise ValueError(
            f"the model takes at most {most} tokens, the sentence has {tokens.size(1)}"
        )
    return tokens


def most_tokens(config: Any) -> Optional[int]:
    """How many tokens the model takes; T5 takes any number."""
    positions = getattr(config, "max_position_embeddings", None)
    if config.model_type == "ea_roberta":
        return positions - config.pad_token_id - 1  # the first ones are for padding
    return positions


@torch.no_grad()
def translate(checkpoint: Checkpoint, source: Tensor) -> Tensor:
    """What the model writes by itself, with 5 beams: (1, tokens)."""
    return checkpoint.model.generate(source, num_beams=5, max_new_tokens=200)[:, 1:]


def maps_of(
    checkpoint: Checkpoint, source: Tensor, target: Optional[Tensor]
) -> Dict[str, List[AttentionMap]]:
    """The maps of one forward pass, by attention; `target` is None unless the model writes text."""
    model, _ = checkpoint
    with torch.no_grad(), collect_maps(model.base_model) as maps:
        if target is None:
            model(source)
        else:
            model(source, decoder_input_ids=decoder_input(checkpoint, target), use_cache=False)
    return by_attention(maps, ATTENTIONS)


def axes_of(
    checkpoint: Checkpoint, source: Tensor, target: Optional[Tensor]
) -> Dict[str, Tuple[List[str], List[str]]]:
    """The tokens of the queries and of the keys of each attention's map."""
    read = names_of(checkpoint, source)
    axes = {"encoder": (read, read)}
    if isinstance(checkpoint.model, CLASSIFIERS):
        target = source
    if target is not None:
        fed = names_of(checkpoint, decoder_input(checkpoint, target))
        axes |= {"decoder": (fed, fed), "encoder-decoder": (fed, read)}
    return axes


def decoder_input(checkpoint: Checkpoint, target: Tensor) -> Tensor:
    """The target behind the token that starts it, without its last one."""
    start = torch.full_like(target[:, :1], checkpoint.model.config.decoder_start_token_id)
    return torch.cat([start, target[:, :-1]], dim=1)


def names_of(checkpoint: Checkpoint, tokens: Tensor) -> List[str]:
    """The text of each token; its name in the vocabulary where it is a part of a character."""
    tokenizer = checkpoint.tokenizer
    names = []
    for token in tokens[0].tolist():
        text = tokenizer.decode([token]).strip()
        names.append(
            text if text and "\ufffd" not in text else tokenizer.convert_ids_to_tokens(token)
        )
    return names
