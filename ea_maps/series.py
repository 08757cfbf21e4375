"""Maps of EA-DC-Transformers, for a time series: aeon's estimators and fairseq's checkpoints."""

from pathlib import Path
from typing import Callable, List, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from ea_aeon import EADCTransformerClassifier, EADCTransformerRegressor
from ea_aeon.data import Preparation, pad
from evolving_attention import AttentionMap, collect_maps


def load(path: Path) -> Tuple[nn.Module, Callable]:
    """The network in a saved estimator or fairseq checkpoint, and what prepares series for it.

    Raises:
        ValueError: the file holds neither.
        FileNotFoundError: there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # fairseq's hold more than numbers; what else it may be is said below
        saved = None
    for kind in (EADCTransformerClassifier, EADCTransformerRegressor):
        if isinstance(saved, dict) and saved.get("estimator") == kind.__name__:
            estimator = kind.load(path, device="cpu")
            return estimator.network_.eval(), estimator.preparation_
    return load_checkpoint(path)


def load_checkpoint(path: Path) -> Tuple[nn.Module, Callable]:
    """The same for a checkpoint of fairseq-train."""
    from fairseq import checkpoint_utils

    import ea_fairseq  # noqa: F401 (registers model and task)

    try:
        models, _, task = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    except Exception as error:  # whatever pickle, torch or fairseq have against it
        raise ValueError(
            f"{path} holds neither an estimator of ea_aeon nor a checkpoint of fairseq: {error!r}"
        ) from error
    if not hasattr(models[0], "network"):
        raise ValueError(f"{path} holds {type(models[0]).__name__}, not an EA-DC-Transformer")
    fitted = task.state.fitted
    return models[0].network.eval(), Preparation(fitted["mean"], fitted["std"])


def look(
    network: nn.Module, prepare: Callable, case: np.ndarray
) -> Tuple[Tensor, List[AttentionMap]]:
    """The series as the network gets it, (channels, steps), and the maps of one forward pass."""
    (series,) = prepare([case])
    with torch.no_grad(), collect_maps(network) as maps:
        network(**pad([series]))
    return series.t(), maps
