"""The EA-DC-Transformer as a classifier and a regressor for aeon and scikit-learn."""

import copy
import inspect
import math
import os
import threading
import warnings
from dataclasses import asdict
from numbers import Integral, Real
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    ClassVar,
    Dict,
    List,
    Optional,
    Sequence,
    Tuple,
    Union,
)

import numpy as np
import torch
from aeon.classification.base import BaseClassifier
from aeon.regression.base import BaseRegressor
from sklearn.utils import check_random_state
from sklearn.utils.class_weight import compute_class_weight
from skorch import NeuralNet
from skorch.callbacks import EarlyStopping, GradientNormClipping, LRScheduler, ProgressBar
from skorch.helper import predefined_split
from skorch.utils import noop
from torch import Tensor, nn
from torch.utils.data import Dataset, StackDataset, Subset

from ea_aeon.data import Preparation, collate, pad, split_off
from ea_aeon.network import DCTransformer, Ensemble, member_of
from evolving_attention import AttentionMap, collect_maps
from evolving_attention.checks import check_count, is_a
from evolving_attention.commands import whole_or_not_at_all

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEDULES = ("constant", "cosine")
# Defaults: at least so many epochs and updates, and several networks if the series have few steps.
EPOCHS, UPDATES = 100, 600
ESTIMATORS, SHORT = 3, 100
# Cells of a batch's maps. Larger maps do not fit into the cache: prediction takes twice as long.
CACHED_CELLS = 1_000_000
LARGE_MAPS = 2**30  # bytes of all maps of a batch, from which on fit warns
NETWORK_OPTIONS = tuple(inspect.signature(DCTransformer).parameters)[3:]
TURNS = threading.Lock()  # threads share PyTorch's random state, so only one of them trains
SMALL = {  # for aeon's tests of estimators
    "d_model": 16,
    "ffn_dim": 16,
    "num_blocks": 2,
    "num_heads": 2,
    "attention_dim": 4,
    "n_epochs": 3,
}


class MicroBatchedNet(NeuralNet):
    """Computes a batch's gradients in parts, so that memory holds the maps of few series.

    The criterion gives one loss per case.
    """

    def __init__(self, *args: Any, micro_batch_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.micro_batch_size = micro_batch_size

    def get_loss(self, y_pred: Tensor, y_true: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().get_loss(y_pred, y_true, *args, **kwargs).mean()

    def train_step_single(self, batch: Tuple[Dict, Tensor], **fit_params: Any) -> Dict:
        size = self.micro_batch_size
        inputs, targets = batch
        steps = []
        for start in range(0, len(targets), size):
            lengths = inputs["lengths"][start : start + size]
            series = inputs["series"][start : start + size, : int(lengths.max())]
            part = {"series": series, "lengths": lengths}
            steps.append(self.part_step(part, targets[start : start + size], len(targets)))
        losses, outputs = zip(*steps, strict=True)
        return {"loss": torch.stack(losses).sum(), "y_pred": torch.cat(outputs)}

    def part_step(self, inputs: Dict, targets: Tensor, cases: int) -> Tuple[Tensor, Tensor]:
        """Adds a part's share of the gradients of a batch of `cases`; its share of the loss."""
        self._set_training(True)
        outputs = self.infer(inputs)
        loss = self.get_loss(outputs, targets, training=True) * (len(targets) / cases)
        loss.backward()
        return loss.detach(), outputs.detach()


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
        d_model=64,
        ffn_dim=128,
        num_blocks=4,
        num_heads=2,
        attention_dim=16,
        key_dim=None,
        kernel_size=3,
        max_distance=128,
        positions="sinusoidal",
        readout="segments",
        num_segments=4,
        dropout=0.1,
        map_dropout=0.0,
        causal=False,
        checkpoint_activations=False,
        alpha=0.3,
        beta=0.5,
        evolution_kernel_size=3,
        learnable=False,
        differences=1,
        n_estimators=None,
        n_epochs=None,
        batch_size=16,
        micro_batch_size=None,
        lr=1e-3,
        lr_schedule="cosine",
        weight_decay=0.0,
        clip_norm=4.0,
        validation_fraction=0.0,
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
        self.key_dim = key_dim
        self.kernel_size = kernel_size
        self.max_distance = max_distance
        self.positions = positions
        self.readout = readout
        self.num_segments = num_segments
        self.dropout = dropout
        self.map_dropout = map_dropout
        self.causal = causal
        self.checkpoint_activations = checkpoint_activations
        self.alpha = alpha
        self.beta = beta
        self.evolution_kernel_size = evolution_kernel_size
        self.learnable = learnable
        self.differences = differences
        self.n_estimators = n_estimators
        self.n_epochs = n_epochs
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.lr = lr
        self.lr_schedule = lr_schedule
        self.weight_decay = weight_decay
        self.clip_norm = clip_norm
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.device = device
        self.verbose = verbose
        self.random_state = random_state
        super().__init__()

    def choose_device(self) -> torch.device:
        """The given device; for "auto" and None, the GPU if there is one.

        Raises:
            ValueError: it is none, or it is not there.
        """
        automatic = self.device is None or self.device == "auto"
        name = ("cuda" if torch.cuda.is_available() else "cpu") if automatic else self.device
        try:
            device = torch.device(name)
            torch.zeros(1, device=device).item()
        except Exception as error:  # each device that is missing raises another error
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"device must be auto, cpu, or another that PyTorch has here (cuda, ...), got "
                f"{name!r}: {reason}"
            ) from error
        return device

    def check_options(self) -> None:
        """Raises ValueError, naming the option, if one of the training is out of range."""
        chosen = {"n_estimators", "n_epochs", "micro_batch_size"}  # unless they are given
        for name in ("n_estimators", "n_epochs", "batch_size", "micro_batch_size", "patience"):
            value = getattr(self, name)
            if value is None and name in chosen:
                continue
            check_count(name, value)
        for name in ("lr", "clip_norm"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not value > 0:
                raise ValueError(f"{name} must be more than 0, got {value!r}")
        if not isinstance(self.weight_decay, Real) or not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be 0 or more, got {self.weight_decay!r}")
        if not isinstance(self.verbose, (Integral, np.bool_)):
            raise ValueError(f"verbose must be True, False or a number, got {self.verbose!r}")
        if self.lr_schedule not in SCHEDULES:
            raise ValueError(
                f"lr_schedule must be one of {', '.join(SCHEDULES)}, got {self.lr_schedule!r}"
            )

    def split(self, cases: int, labels: Optional[Sequence] = None) -> Tuple[np.ndarray, ...]:
        """Indices of the cases to train and to validate on, and the seed of the training."""
        self.check_options()
        seed = int(check_random_state(self.random_state).randint(2**31))
        return (*split_off(cases, self.validation_fraction, seed, labels), seed)

    def series_at_once(self, cases: int, length: int, layers: int) -> int:
        """Series of a batch whose gradients are computed at once.

        Warns if the maps of more would be large, or those of one are.
        """
        cells = self.num_heads * length**2 if self.attention_dim else 0
        series_bytes = 4 * cells * layers
        wanted = min(cases, self.batch_size, self.micro_batch_size or self.batch_size)
        if series_bytes * wanted <= LARGE_MAPS:
            return wanted
        about = (
            f"the attention maps of {wanted} series of {length} steps take "
            f"{wanted * series_bytes / 2**30:.1f} GB ({layers} layers of {self.num_heads} heads), "
            "and training several times that"
        )
        advice = "fewer num_heads and checkpoint_activations=True need less memory and less time"
        if self.micro_batch_size is None:
            wanted = max(1, LARGE_MAPS // series_bytes)
            about += f", so gradients are computed for {wanted} at a time; give micro_batch_size"
            about += " to choose another number"
        warnings.warn(f"{about}; {advice}", stacklevel=2)
        return wanted

    def train(
        self,
        X: Sequence[np.ndarray],
        targets: Tensor,
        out_features: int,
        criterion: nn.Module,
        split: Tuple[np.ndarray, np.ndarray, int],
    ) -> None:
        """Fits the preparation, then trains the networks with skorch.

        `criterion` gives one loss per case.
        """
        training, validation, seed = split
        self.preparation_ = Preparation.fit([X[index] for index in training], self.differences)
        cases = StackDataset(self.preparation_(X), targets)
        self.network_options_ = {
            "in_channels": self.preparation_.num_channels,
            "out_features": out_features,
            "max_length": max(case.shape[1] for case in X),
            **{name: getattr(self, name) for name in NETWORK_OPTIONS},
        }
        updates = math.ceil(len(training) / self.batch_size)  # of an epoch
        self.n_epochs_ = self.n_epochs or max(EPOCHS, math.ceil(UPDATES / updates))
        short = self.network_options_["max_length"] <= SHORT
        self.n_estimators_ = self.n_estimators or (ESTIMATORS if short else 1)
        self.history_: List[Dict] = []
        members = [
            self.train_one(cases, training, validation, criterion, number, seed + number)
            for number in range(self.n_estimators_)
        ]
        self.network_ = self.combine(members).eval()

    def combine(self, members: List[nn.Module]) -> nn.Module:
        """One network of all members."""
        return members[0] if len(members) == 1 else Ensemble(members, self.averages_probabilities)

    def train_one(
        self,
        cases: Dataset,
        training: np.ndarray,
        validation: np.ndarray,
        criterion: nn.Module,
        number: int,
        seed: int,
    ) -> nn.Module:
        """Trains a network and adds its epochs to the history."""
        data, device = Subset(cases, training), self.choose_device()
        held_out = predefined_split(Subset(cases, validation)) if len(validation) else None
        callbacks = [("clipping", GradientNormClipping(self.clip_norm))]
        stopping = EarlyStopping(patience=self.patience, load_best=True, sink=noop)
        if len(validation):
            callbacks.append(("stopping", stopping))
        if self.lr_schedule == "cosine":
            updates = self.n_epochs_ * math.ceil(len(data) / self.batch_size)
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR
            callbacks.append(("schedule", LRScheduler(cosine, T_max=updates, step_every="batch")))
        if self.verbose:
            callbacks.append(("progress", ProgressBar(detect_notebook=False)))
        gpus = [device] if device.type == "cuda" else []
        with TURNS, torch.random.fork_rng(gpus):  # leaves the caller's random state alone
            torch.manual_seed(seed)
            network = DCTransformer(**self.network_options_).float()
            layers = 2 * len(network.blocks)
            net = MicroBatchedNet(
                network,
                criterion=criterion,
                optimizer=torch.optim.AdamW,
                optimizer__weight_decay=self.weight_decay,
                optimizer__fused=True,
                lr=self.lr,
                max_epochs=self.n_epochs_,
                batch_size=self.batch_size,
                micro_batch_size=self.series_at_once(len(data), network.max_length, layers),
                iterator_train__shuffle=True,
                iterator_train__collate_fn=collate,
                iterator_valid__collate_fn=collate,
                train_split=held_out,
                callbacks=callbacks,
                device=device,
                verbose=int(self.verbose),
            ).initialize()
            net.notify("on_train_begin", X=data, y=None)
            try:
                net.fit_loop(data)
            except KeyboardInterrupt:  # skorch stops early with it; fit() would also hide Ctrl-C
                if not len(validation) or stopping.misses_ < self.patience:
                    raise
            net.notify("on_train_end", X=data, y=None)
        if not np.isfinite(net.history[-1, "train_loss"]):
            raise ValueError(f"the loss is not finite: training diverged; lower lr={self.lr}")
        if len(validation) and not np.isfinite(net.history[:, "valid_loss"]).any():
            raise ValueError(
                "the loss of the series that validation_fraction holds out is never finite: some "
                "have values too far from those of the others"
            )
        self.history_ += [{"member": number, **epoch} for epoch in net.history.to_list()]
        return net.module_

    @torch.no_grad()
    def outputs(self, X: Sequence[np.ndarray]) -> Tensor:
        """The network's outputs for series in aeon's format, (cases, out_features)."""
        device = self.choose_device()
        network = self.network_.to(device).eval()
        series = self.preparation_(X)
        options = self.network_options_
        longest_first = np.argsort([-len(case) for case in series], kind="stable")
        found: List[Tensor] = []
        while len(found) < len(series):
            count = self.batch_size
            if device.type == "cpu" and options["attention_dim"]:
                cells = options["num_heads"] * len(series[longest_first[len(found)]]) ** 2
                count = max(1, min(count, CACHED_CELLS // cells))
            batch = pad([series[i] for i in longest_first[len(found) : len(found) + count]])
            found.extend(network(**{name: x.to(device) for name, x in batch.items()}).cpu())
        outputs = torch.stack([found[place] for place in np.argsort(longest_first)])
        for number, case in enumerate(outputs):
            if not case.isfinite().all():
                extreme = np.nanmax(np.abs(X[number]))
                raise ValueError(
                    f"series {number} gives no finite prediction: its values, up to {extreme:.3g} "
                    "in size, are too far from those of the training"
                )
        return outputs

    def attention_maps(self, X: Any, member: int = 0) -> List[AttentionMap]:
        """The maps of one pass over series, one of each attention in its order, on the CPU.

        Args:
            X: series as for `predict`. The maps of all of them are in memory at once.
            member: number of the network, if several were trained.

        Returns:
            Maps (cases, heads, steps, steps). Those of shorter series are 0 at the end.

        Raises:
            NotFittedError: the estimator is not fitted.
            ValueError: the series do not fit those of the training, there is no such member, or
                the network has no attention.
        """
        self._check_is_fitted()
        X = self._preprocess_collection(X, store_metadata=False)
        self._check_shape(X)
        device = self.choose_device()
        network = member_of(self.network_.to(device).eval(), member)
        batch = pad(self.preparation_(X))
        with torch.no_grad(), collect_maps(network) as maps:
            network(**{name: x.to(device) for name, x in batch.items()})
        padding = torch.arange(batch["series"].size(1)) >= batch["lengths"].unsqueeze(1)
        padding = padding[:, None, :, None] | padding[:, None, None, :]  # (cases, 1, steps, steps)
        return [
            AttentionMap(name, *(x.cpu().masked_fill(padding, 0.0) for x in pair))
            for name, *pair in maps
        ]

    def plot_maps(
        self, case: np.ndarray, layers: int = 6, heads: int = 4, member: int = 0
    ) -> "Figure":
        """A figure of the maps for one series, which a notebook shows.

        Args:
            case: the series, (channels, steps), or (steps,) of one channel, such as X[0].
            layers, heads: to draw at most, evenly spaced.
            member: as in :meth:`attention_maps`, whose errors it raises, too.

        Raises:
            ImportError: the extra `viz` is not installed.
        """
        from ea_maps.series import look
        from ea_maps.view import SeriesView

        self._check_is_fitted()
        case = np.asarray(case)
        if case.ndim not in (1, 2):
            raise ValueError(f"case must be one series, (channels, steps), got shape {case.shape}")
        network = self.network_.cpu().eval()
        series, maps = look(network, self.preparation_, np.atleast_2d(case), member)
        return SeriesView({type(self).__name__: maps}, series.numpy()).figure(layers, heads)

    def __getstate__(self) -> Dict:
        """The state for pickle and copies, with the weights on the CPU, where any machine loads."""
        state = super().__getstate__()
        network = state.get("network_")
        if network is not None and any(x.device.type != "cpu" for x in network.parameters()):
            state = {**state, "network_": copy.deepcopy(network).cpu()}
        return state

    def save(self, path: Union[str, os.PathLike]) -> None:
        """Saves the fitted estimator to a file that holds only numbers and options, no code.

        A `random_state` that is a generator is not saved.

        Raises:
            NotFittedError: the estimator is not fitted.
            ValueError: an option or the labels are of a type that :meth:`load` would not accept.
            OSError: the file cannot be written.
        """
        self._check_is_fitted()
        options = self.get_params(deep=False)
        del options["device"]  # load has one of its own
        if isinstance(self.random_state, np.random.RandomState):
            options["random_state"] = None
        saved = {
            "estimator": type(self).__name__,
            "options": options,
            "network_options": self.network_options_,
            "estimators": self.n_estimators_,
            "preparation": asdict(self.preparation_),
            "target": self.target_state(),
            "metadata": dict(self.metadata_),
            "epochs": self.n_epochs_,
            "history": self.history_,
            "weights": dict(self.network_.state_dict()),
        }
        saved = {name: as_plain(value, name) for name, value in saved.items()}
        with whole_or_not_at_all(Path(path), overwrite=True) as part:
            torch.save(saved, part)

    @classmethod
    def load(cls, path: Union[str, os.PathLike], device: str = "auto") -> "DCTransformerEstimator":
        """Loads an estimator that :meth:`save` saved, for prediction on `device`.

        Raises:
            ValueError: the file holds no estimator of this class, or one of an earlier version
                with another network; or there is no such device.
        """
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # a file may hold anything
            raise ValueError(f"{path} holds no {cls.__name__}: {error!r}") from error
        if not isinstance(saved, dict) or saved.get("estimator") != cls.__name__:
            raise ValueError(f"{path} holds no {cls.__name__}")
        if "network_options" not in saved:
            raise ValueError(
                f"{path} was saved by an earlier version, whose network had another activation "
                "before its read-out; fit and save it again"
            )
        estimator = cls(**{**saved["options"], "device": device})
        estimator.choose_device()  # an error here is better than one at the first prediction
        estimator.preparation_ = Preparation(**saved["preparation"])
        estimator.metadata_, estimator.history_ = saved["metadata"], saved["history"]
        estimator.restore_target(saved["target"])
        estimator.network_options_ = saved["network_options"]
        estimator.n_estimators_, estimator.n_epochs_ = saved["estimators"], saved["epochs"]
        members = [DCTransformer(**saved["network_options"]) for _ in range(saved["estimators"])]
        estimator.network_ = estimator.combine(members).float().eval()
        estimator.network_.load_state_dict(saved["weights"])
        estimator.is_fitted = True
        return estimator

    @classmethod
    def _get_test_params(cls, parameter_set="default") -> Dict:
        return SMALL


def as_plain(value: Any, name: str) -> Any:
    """Replaces numpy's numbers, which torch.load refuses, by Python's.

    Raises:
        ValueError: a value that torch.load refuses; `name` says where it stands.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (list, tuple)):
        return [as_plain(item, name) for item in value]
    if isinstance(value, dict):
        return {as_plain(key, name): as_plain(x, f"{name}, {key}") for key, x in value.items()}
    if value is None or isinstance(value, (bool, int, float, str, Tensor)):
        return value
    raise ValueError(
        f"{name}: {value!r} cannot be saved, because load would refuse it; numbers, strings, lists "
        "and dicts can"
    )


def with_option(function: Callable, name: str, default: Any) -> inspect.Signature:
    """The function's signature with another option at its end."""
    signature = inspect.signature(function)
    option = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
    return signature.replace(parameters=[*signature.parameters.values(), option])


class EADCTransformerClassifier(DCTransformerEstimator, BaseClassifier):
    """EA-DC-Transformer classifier of time series with any number of channels and any lengths.

    The network is :class:`ea_aeon.network.DCTransformer`, which documents `d_model` to `learnable`.
    Channels are standardised with the training series' statistics; missing values (NaN) are
    interpolated.

    Args:
        differences: orders of differences between neighbouring steps that are added as channels; 0
            for none.
        n_estimators: networks to train, which differ in their seed; their probabilities are
            averaged. None means 3, or 1 if series have more than 100 steps.
        n_epochs: passes over the training series; None means 100, or more if that gives fewer than
            600 updates.
        batch_size: series per update. A batch is padded to its longest series.
        micro_batch_size: series whose gradients are computed at once and added up. It limits the
            memory, and batch normalisation then sees only these series. None means the whole
            batch, or as many as keep all maps of the network within 1 GiB, with a warning.
        lr: learning rate of AdamW.
        lr_schedule: "constant", or "cosine" to decrease it to 0 over all epochs.
        weight_decay: of AdamW.
        clip_norm: gradients are clipped to this norm.
        validation_fraction: fraction of the series that is not trained on but decides when to
            stop; 0 trains on all series for all epochs and keeps the last weights.
        patience: epochs without a lower validation loss after which training stops. The weights
            of the best epoch are kept.
        device: "cpu", "cuda", ...; "auto" and None mean the GPU if there is one.
        verbose: show a progress bar and the losses.
        random_state: seed or numpy's RandomState; the same seed gives the same network on a CPU.
        class_weight: weights of the classes in the loss, as in scikit-learn: a dict, "balanced" for
            the inverse of their frequencies, or None.

    Attributes:
        classes_: the labels.
        network_: the fitted network, a :class:`~ea_aeon.network.DCTransformer`, or an
            :class:`~ea_aeon.network.Ensemble` of several.
        network_options_: the arguments of each :class:`~ea_aeon.network.DCTransformer`.
        preparation_: the :class:`~ea_aeon.data.Preparation` of series for the network.
        n_estimators_, n_epochs_: the numbers that were chosen.
        history_: a dict for each epoch of each network: member, train_loss, valid_loss, dur, ...

    Raises:
        ValueError: an argument is out of range, or series do not fit those of the training; the
            message names it.
    """

    averages_probabilities: ClassVar[bool] = True

    def __init__(self, *args, class_weight=None, **options) -> None:
        self.class_weight = class_weight
        super().__init__(*args, **options)

    # scikit-learn reads the options from the signature.
    __init__.__signature__ = with_option(DCTransformerEstimator.__init__, "class_weight", None)

    def _fit(self, X, y):
        labels = np.array([self._class_dictionary[label] for label in y])
        split = self.split(len(X), labels)
        criterion = nn.CrossEntropyLoss(self.weights_of_classes(y), reduction="none")
        self.train(X, torch.from_numpy(labels), self.n_classes_, criterion, split)
        return self

    def weights_of_classes(self, y: np.ndarray) -> Optional[Tensor]:
        """Of each class in the loss."""
        given = self.class_weight
        if given is None:
            return None
        if isinstance(given, str) and given == "balanced":
            weights = compute_class_weight(given, classes=self.classes_, y=y).tolist()
        elif isinstance(given, dict):
            labels = self.classes_.tolist()
            unknown = [label for label in given if label not in labels]
            if unknown and any(label not in given for label in labels):
                raise ValueError(f"class_weight names {unknown}, but the classes are {labels}")
            weights = [given.get(label, 1.0) for label in labels]
            if not all(is_a(Real, x) and 0 <= x < math.inf for x in weights):
                raise ValueError(f"class_weight must hold numbers of 0 or more, got {given!r}")
        else:
            raise ValueError(
                "class_weight must be None, 'balanced' or a dict of weights by class; got "
                f"{given!r}"
            )
        return torch.tensor(weights, dtype=torch.float32)

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


class EADCTransformerRegressor(DCTransformerEstimator, BaseRegressor):
    """EA-DC-Transformer regressor of time series with any number of channels and any lengths.

    Like :class:`EADCTransformerClassifier`, but it predicts numbers: the loss is the mean squared
    error of the standardised target, whose mean and standard deviation are the attributes
    `target_mean_` and `target_std_`.
    """

    averages_probabilities: ClassVar[bool] = False

    def _fit(self, X, y):
        y = np.asarray(y, dtype=np.float64)
        split = self.split(len(X))
        known = y[split[0]]
        self.target_mean_, self.target_std_ = float(known.mean()), float(known.std()) or 1.0
        if not np.isfinite(self.target_std_):
            raise ValueError("y has values too large for double precision")
        targets = torch.from_numpy((y - self.target_mean_) / self.target_std_)
        self.train(X, targets.float().unsqueeze(1), 1, nn.MSELoss(reduction="none"), split)
        return self

    def _predict(self, X) -> np.ndarray:
        return self.outputs(X)[:, 0].double().numpy() * self.target_std_ + self.target_mean_

    def target_state(self) -> Dict:
        """Mean and standard deviation of the training target."""
        return {"mean": self.target_mean_, "std": self.target_std_}

    def restore_target(self, state: Dict) -> None:
        """Restores what :meth:`target_state` returned."""
        self.target_mean_, self.target_std_ = state["mean"], state["std"]
