"""Maps of EA-DC-Transformers for a time series: estimators and fairseq checkpoints."""

from pathlib import Path
from typing import List, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from ea_aeon import EADCTransformerClassifier, EADCTransformerRegressor
from ea_aeon.data import Preparation, pad
from ea_aeon.network import member_of
from evolving_attention import AttentionMap, collect_maps


def load(path: Path) -> Tuple[nn.Module, Preparation]:
    """Loads the network of a saved estimator or fairseq checkpoint, and its preparation of series.

    Raises:
        ValueError: the file is neither.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # perhaps a checkpoint of fairseq, which holds other objects, too
        saved = None
    for kind in (EADCTransformerClassifier, EADCTransformerRegressor):
        if isinstance(saved, dict) and saved.get("estimator") == kind.__name__:
            estimator = kind.load(path, device="cpu")
            return estimator.network_.eval(), estimator.preparation_
    return load_checkpoint(path)


def load_checkpoint(path: Path) -> Tuple[nn.Module, Preparation]:
    """The same for a checkpoint of fairseq-train."""
    from fairseq import checkpoint_utils

    import ea_fairseq  # noqa: F401 (registers model and task)

    try:
        models, _, task = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    except Exception as error:  # pickle, torch and fairseq may raise anything
        raise ValueError(
            f"{path} holds neither an estimator of ea_aeon nor a checkpoint of fairseq: {error!r}"
        ) from error
    if not hasattr(models[0], "network"):
        raise ValueError(f"{path} holds {type(models[0]).__name__}, not an EA-DC-Transformer")
    return models[0].network.eval(), task.preparation


def look(
    network: nn.Module, prepare: Preparation, case: np.ndarray, member: int = 0
) -> Tuple[Tensor, List[AttentionMap]]:
    """The standardised series, (channels, steps), and the maps of one forward pass.

    Args:
        member: number of the network in an ensemble.
    """
    network = member_of(network, member)
    (series,) = prepare([case])
    with torch.no_grad(), collect_maps(network) as maps:
        network(**pad([series]))
    return series[:, : len(prepare.mean)].t(), maps  # without its differences
