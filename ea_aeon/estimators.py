"""The EA-DC-Transformer as a classifier and a regressor for aeon and scikit-learn."""

import inspect
import os
from numbers import Integral, Real
from typing import Any, ClassVar, Dict, List, Optional, Sequence, Tuple, Type, Union

import numpy as np
import torch
from aeon.classification.base import BaseClassifier
from aeon.regression.base import BaseRegressor
from sklearn.utils import check_random_state
from skorch import NeuralNet
from skorch.callbacks import EarlyStopping, GradientNormClipping, LRScheduler, ProgressBar
from skorch.helper import predefined_split
from skorch.utils import noop
from torch import Tensor, nn
from torch.utils.data import Subset

from ea_aeon.data import Cases, Preparation, collate, pad, split_off
from ea_aeon.network import DCTransformer

SCHEDULES = ("constant", "cosine")
# Cells of a batch's maps. Larger maps do not fit into the cache: prediction takes twice as long.
CACHED_CELLS = 1_000_000
NETWORK_OPTIONS = tuple(inspect.signature(DCTransformer).parameters)[2:]
SMALL = {  # for aeon's tests of estimators
    "d_model": 16,
    "ffn_dim": 16,
    "num_blocks": 2,
    "num_heads": 2,
    "attention_dim": 4,
    "n_epochs": 3,
}


class DCTransformerEstimator:
    """Base class of the classifier and the regressor: options, training, prediction, files."""

    _tags: ClassVar[Dict] = {
        "X_inner_type": ["np-list", "numpy3D"],
        "capability:multivariate": True,
        "capability:unequal_length": True,
        "capability:missing_values": True,
        "algorithm_type": "deeplearning",
        "python_dependencies": ["torch", "skorch"],
    }

    def __init__(
        self,
        d_model=128,
        ffn_dim=256,
        num_blocks=4,
        num_heads=8,
        attention_dim=32,
        kernel_size=3,
        max_distance=128,
        dropout=0.1,
        causal=False,
        alpha=0.3,
        beta=0.5,
        evolution_kernel_size=3,
        learnable=False,
        n_epochs=100,
        batch_size=16,
        lr=1e-3,
        lr_schedule="constant",
        clip_norm=4.0,
        validation_fraction=0.2,
        patience=30,
        device="auto",
        verbose=False,
        random_state=None,
    ) -> None:
        self.d_model = d_model
        self.ffn_dim = ffn_dim
        self.num_blocks = num_blocks
        self.num_heads = num_heads
        self.attention_dim = attention_dim
        self.kernel_size = kernel_size
        self.max_distance = max_distance
        self.dropout = dropout
        self.causal = causal
        self.alpha = alpha
        self.beta = beta
        self.evolution_kernel_size = evolution_kernel_size
        self.learnable = learnable
        self.n_epochs = n_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.lr_schedule = lr_schedule
        self.clip_norm = clip_norm
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.device = device
        self.verbose = verbose
        self.random_state = random_state
        super().__init__()

    @property
    def chosen_device(self) -> torch.device:
        """The given device; for "auto", the GPU if there is one."""
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            return torch.device(automatic if self.device == "auto" else self.device)
        except RuntimeError as error:
            raise ValueError(f"device must be auto, cpu, cuda, ...; got {self.device!r}") from error

    def check_options(self) -> None:
        """Raises ValueError, naming the option, if one of the training is out of range."""
        for name in ("n_epochs", "batch_size", "patience"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value!r}")
        for name in ("lr", "clip_norm"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not value > 0:
                raise ValueError(f"{name} must be more than 0, got {value!r}")
        if self.lr_schedule not in SCHEDULES:
            raise ValueError(
                f"lr_schedule must be one of {', '.join(SCHEDULES)}, got {self.lr_schedule!r}"
            )

    def split(self, cases: int, labels: Optional[Sequence] = None) -> Tuple[np.ndarray, ...]:
        """Indices of the cases to train and to validate on, and the seed of the training."""
        self.check_options()
        seed = int(check_random_state(self.random_state).randint(2**31))
        return (*split_off(cases, self.validation_fraction, seed, labels), seed)

    def train(
        self,
        X: Sequence[np.ndarray],
        targets: Tensor,
        out_features: int,
        criterion: Type[nn.Module],
        split: Tuple[np.ndarray, np.ndarray, int],
    ) -> None:
        """Fits the preparation, then trains the network with skorch."""
        training, validation, seed = split
        self.preparation_ = Preparation.fit([X[index] for index in training])
        cases = Cases(self.preparation_(X), targets)
        callbacks = [("clipping", GradientNormClipping(self.clip_norm))]
        stopping = EarlyStopping(patience=self.patience, load_best=True, sink=noop)
        if len(validation):
            callbacks.append(("stopping", stopping))
        if self.lr_schedule == "cosine":
            cosine = LRScheduler(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=self.n_epochs)
            callbacks.append(("schedule", cosine))
        if self.verbose:
            callbacks.append(("progress", ProgressBar()))
        net = NeuralNet(
            DCTransformer,
            criterion=criterion,
            optimizer=torch.optim.Adam,
            lr=self.lr,
            max_epochs=self.n_epochs,
            batch_size=self.batch_size,
            iterator_train__shuffle=True,
            iterator_train__collate_fn=collate,
            iterator_valid__collate_fn=collate,
            train_split=predefined_split(Subset(cases, validation)) if len(validation) else None,
            callbacks=callbacks,
            device=self.chosen_device,
            verbose=int(self.verbose),
            module__in_channels=len(self.preparation_.mean),
            module__out_features=out_features,
            **{f"module__{name}": getattr(self, name) for name in NETWORK_OPTIONS},
        )
        data = Subset(cases, training)
        with torch.random.fork_rng():  # leaves the caller's random state alone
            torch.manual_seed(seed)
            net.initialize()
            net.notify("on_train_begin", X=data, y=None)
            try:
                net.fit_loop(data)
            except KeyboardInterrupt:  # skorch stops early with it; fit() would also hide Ctrl-C
                if not len(validation) or stopping.misses_ < self.patience:
                    raise
            net.notify("on_train_end", X=data, y=None)
        self.network_, self.history_ = net.module_, net.history.to_list()
        if not np.isfinite(self.history_[-1]["train_loss"]):
            raise ValueError(f"the loss is not finite: training diverged; lower lr={self.lr}")

    @torch.no_grad()
    def outputs(self, X: Sequence[np.ndarray]) -> Tensor:
        """The network's outputs for series in aeon's format, (cases, out_features)."""
        device = self.chosen_device
        network = self.network_.to(device).eval()
        series = self.preparation_(X)
        longest_first = np.argsort([-len(case) for case in series], kind="stable")
        found: List[Tensor] = []
        while len(found) < len(series):
            count = self.batch_size
            if device.type == "cpu":
                cells = self.num_heads * len(series[longest_first[len(found)]]) ** 2
                count = max(1, min(count, CACHED_CELLS // cells))
            batch = pad([series[i] for i in longest_first[len(found) : len(found) + count]])
            found.extend(network(**{name: x.to(device) for name, x in batch.items()}).cpu())
        return torch.stack([found[place] for place in np.argsort(longest_first)])

    def save(self, path: Union[str, os.PathLike]) -> None:
        """Saves the fitted estimator to a file that holds only numbers and options, no code.

        A `random_state` that is a generator is not saved.

        Raises:
            NotFittedError: the estimator is not fitted.
        """
        self._check_is_fitted()
        options = self.get_params(deep=False)
        if isinstance(self.random_state, np.random.RandomState):
            options["random_state"] = None
        saved = {
            "estimator": type(self).__name__,
            "options": options,
            "channels": (self.preparation_.mean, self.preparation_.std),
            "target": self.target_state(),
            "metadata": dict(self.metadata_),
            "history": self.history_,
            "weights": self.network_.state_dict(),
        }
        torch.save({name: as_plain(value) for name, value in saved.items()}, path)

    @classmethod
    def load(cls, path: Union[str, os.PathLike], device: str = "auto") -> "DCTransformerEstimator":
        """Loads an estimator that :meth:`save` saved, for prediction on `device`.

        Raises:
            ValueError: the file holds no estimator of this class.
        """
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # a file may hold anything
            raise ValueError(f"{path} holds no {cls.__name__}: {error!r}") from error
        if not isinstance(saved, dict) or saved.get("estimator") != cls.__name__:
            raise ValueError(f"{path} holds no {cls.__name__}")
        estimator = cls(**{**saved["options"], "device": device})
        estimator.preparation_ = Preparation(*saved["channels"])
        estimator.metadata_, estimator.history_ = saved["metadata"], saved["history"]
        estimator.restore_target(saved["target"])
        weights = saved["weights"]
        estimator.network_ = DCTransformer(
            len(estimator.preparation_.mean),
            len(weights["head.bias"]),
            **{name: getattr(estimator, name) for name in NETWORK_OPTIONS},
        )
        estimator.network_.load_state_dict(weights)
        estimator.is_fitted = True
        return estimator


def as_plain(value: Any) -> Any:
    """Replaces numpy's numbers, which torch.load refuses, by Python's."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [as_plain(item) for item in value]
    if type(value) is dict:
        return {key: as_plain(item) for key, item in value.items()}
    return value


class EADCTransformerClassifier(DCTransformerEstimator, BaseClassifier):
    """EA-DC-Transformer classifier of time series with any number of channels and any lengths.

    The network is :class:`ea_aeon.network.DCTransformer`, which documents `d_model` to `learnable`.
    Channels are standardised with the training series' statistics; missing values (NaN) are
    interpolated.

    Args:
        n_epochs: maximum number of epochs.
        batch_size: series per batch.
        lr: learning rate of Adam.
        lr_schedule: "constant", or "cosine" to decrease it to 0 over `n_epochs`.
        clip_norm: gradients are clipped to this norm.
        validation_fraction: fraction of the series that decides when to stop; 0 trains for
            `n_epochs`.
        patience: epochs without a lower validation loss after which training stops. The weights
            of the best epoch are kept.
        device: "cpu", "cuda", ...; "auto" is the GPU if there is one.
        verbose: show a progress bar and the losses.
        random_state: seed or numpy's RandomState; the same seed gives the same network on a CPU.

    Attributes:
        classes_: the labels.
        network_: the fitted network.
        history_: a dict for each epoch: train_loss, valid_loss, dur, ...

    Raises:
        ValueError: an argument is out of range, or series do not fit those of the training; the
            message names it.
    """

    def _fit(self, X, y):
        labels = np.array([self._class_dictionary[label] for label in y])
        split = self.split(len(X), labels)
        self.train(X, torch.from_numpy(labels), self.n_classes_, nn.CrossEntropyLoss, split)
        return self

    def _predict_proba(self, X) -> np.ndarray:
        return self.outputs(X).double().softmax(dim=1).numpy()

    def _predict(self, X) -> np.ndarray:
        return self.classes_[self.outputs(X).argmax(dim=1).numpy()]

    def target_state(self) -> Dict:
        """The labels, as plain values."""
        return {"classes": self.classes_.tolist(), "dtype": str(self.classes_.dtype)}

    def restore_target(self, state: Dict) -> None:
        """Restores what :meth:`target_state` returned."""
        self.classes_ = np.array(state["classes"], dtype=state["dtype"])
        self.n_classes_ = len(self.classes_)
        self._class_dictionary = {label: index for index, label in enumerate(self.classes_)}

    @classmethod
    def _get_test_params(cls, parameter_set="default") -> Dict:
        return SMALL


class EADCTransformerRegressor(DCTransformerEstimator, BaseRegressor):
    """EA-DC-Transformer regressor of time series with any number of channels and any lengths.

    Like :class:`EADCTransformerClassifier`, but it predicts numbers: the loss is the mean squared
    error of the standardised target.
    """

    def _fit(self, X, y):
        y = np.asarray(y, dtype=np.float64)
        split = self.split(len(X))
        known = y[split[0]]
        self.target_mean_, self.target_std_ = float(known.mean()), float(known.std()) or 1.0
        targets = torch.from_numpy((y - self.target_mean_) / self.target_std_)
        self.train(X, targets.float().unsqueeze(1), 1, nn.MSELoss, split)
        return self

    def _predict(self, X) -> np.ndarray:
        return self.outputs(X)[:, 0].double().numpy() * self.target_std_ + self.target_mean_

    def target_state(self) -> Dict:
        """Mean and standard deviation of the training target."""
        return {"mean": self.target_mean_, "std": self.target_std_}

    def restore_target(self, state: Dict) -> None:
        """Restores what :meth:`target_state` returned."""
        self.target_mean_, self.target_std_ = state["mean"], state["std"]

    @classmethod
    def _get_test_params(cls, parameter_set="default") -> Dict:
        return SMALL
