"""``time_series``: classification and regression on data sets of the UEA, UCR and TSER archives."""

from argparse import ArgumentParser
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Dict, List, Optional

import numpy as np
import torch
from fairseq.data import FairseqDataset
from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import FairseqTask, register_task
from omegaconf import II, MISSING, OmegaConf
from torch import Tensor

if TYPE_CHECKING:  # aeon is installed only for time series
    from ea_aeon.data import Preparation, TimeSeries


@dataclass
class TimeSeriesConfig(FairseqDataclass):
    dataset_name: str = field(
        default=MISSING, metadata={"help": "name of the data set, for example JapaneseVowels"}
    )
    dataset_dir: Optional[str] = field(
        default=None,
        metadata={
            "help": "folder of NAME/NAME_TRAIN.ts, NAME/NAME_TEST.ts, also .ts.gz (default: from "
            "aeon, which includes or downloads it)"
        },
    )
    differences: int = field(
        default=1,
        metadata={
            "help": "orders of differences between neighbouring steps that are added as channels, "
            "0 for none (default: 1)"
        },
    )
    validation_fraction: float = field(
        default=0.2,
        metadata={"help": "fraction of the training split to validate on (default: 0.2)"},
    )
    split_seed: int = field(
        default=1, metadata={"help": "seed for choosing the cases to validate on (default: 1)"}
    )
    seed: int = II("common.seed")


class TimeSeriesDataset(FairseqDataset):
    """Prepared series (steps, channels) and their targets, shuffled in each epoch.

    Args:
        seed: for shuffling; None keeps the order of the file.
    """

    can_reuse_epoch_itr_across_epochs = False

    def __init__(self, series: List[Tensor], targets: Tensor, seed: Optional[int]) -> None:
        self.series, self.targets, self.seed = series, targets, seed
        self.sizes = np.array([len(case) for case in series])
        self.epoch = 1

    def __len__(self) -> int:
        return len(self.series)

    def __getitem__(self, index: int) -> Dict:
        return {"id": index, "series": self.series[index], "target": self.targets[index]}

    def num_tokens(self, index: int) -> int:
        return int(self.sizes[index])

    def size(self, index: int) -> int:
        return int(self.sizes[index])

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def ordered_indices(self) -> np.ndarray:
        if self.seed is None:
            return np.arange(len(self))
        return np.random.default_rng((self.seed, self.epoch)).permutation(len(self))

    def collater(self, samples: List[Dict]) -> Dict:
        """A batch, or {} of no samples."""
        from ea_aeon.data import pad

        if not samples:
            return {}
        net_input = pad([sample["series"] for sample in samples])
        return {
            "id": torch.tensor([sample["id"] for sample in samples]),
            "net_input": net_input,
            "target": torch.stack([sample["target"] for sample in samples]),
            "ntokens": int(net_input["lengths"].sum()),
            "nsentences": len(samples),
        }


@register_task("time_series", dataclass=TimeSeriesConfig)
class TimeSeriesTask(FairseqTask):
    """Classification or regression of the time series of one data set.

    The splits "train" and "valid" are parts of the official training split; "test" is the official
    test split. The statistics for standardisation come from "train" only. They are saved in the
    checkpoint, as are the class labels of the official training split.
    """

    def __init__(self, cfg: TimeSeriesConfig) -> None:
        super().__init__(cfg)
        self.state.add_factory("fitted", self.fit)

    @classmethod
    def setup_task(cls, cfg: TimeSeriesConfig, **kwargs) -> "TimeSeriesTask":
        """Creates the task. Raises ValueError without --dataset-name."""
        if OmegaConf.is_missing(cfg, "dataset_name"):
            raise ValueError("--dataset-name is required, for example JapaneseVowels")
        return cls(cfg)

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        """Adds the options, and sets defaults of fairseq-train that suit time series."""
        super().add_args(parser)
        parser.set_defaults(
            criterion="time_series",
            optimizer="adam",
            lr=[1e-3],
            clip_norm=4.0,
            max_epoch=100,
            batch_size=16,
            required_batch_size_multiple=1,
            keep_last_epochs=1,
        )

    def read(self, split: str) -> "TimeSeries":
        from ea_aeon.data import read

        return read(self.cfg.dataset_name, split, self.cfg.dataset_dir)

    def parts(self, data: "TimeSeries") -> Dict[str, np.ndarray]:
        """The cases of the official training split that belong to "train" and to "valid"."""
        from ea_aeon.data import split_off

        labels = None if data.is_regression else data.targets
        cfg = self.cfg
        parts = split_off(len(data.series), cfg.validation_fraction, cfg.split_seed, labels)
        return dict(zip(("train", "valid"), parts, strict=True))

    def fit(self) -> Dict:
        """Statistics and labels of the training cases, for the checkpoint."""
        from ea_aeon.data import Preparation

        data = self.read("train")
        train = self.parts(data)["train"]
        training = [data.series[index] for index in train]
        preparation = Preparation.fit(training, self.cfg.differences)
        fitted = {"preparation": asdict(preparation), "classes": None}
        fitted["max_length"] = max(case.shape[1] for case in data.series)
        if data.is_regression:
            targets = data.targets[train].astype(float)
            fitted["target_mean"] = float(targets.mean())
            fitted["target_std"] = float(targets.std()) or 1.0
        else:
            fitted["classes"] = sorted({str(label) for label in data.targets})
        return fitted

    @property
    def is_regression(self) -> bool:
        return self.state.fitted["classes"] is None

    @property
    def preparation(self) -> "Preparation":
        """What is done with a series before it is the network's input."""
        from ea_aeon.data import Preparation

        if "preparation" not in self.state.fitted:
            raise ValueError(
                "the checkpoint is of an earlier version, whose network had another activation "
                "before its read-out; train again"
            )
        return Preparation(**self.state.fitted["preparation"])

    @property
    def max_length(self) -> int:
        """Steps of the longest series of the official training split."""
        return self.state.fitted["max_length"]

    @property
    def num_outputs(self) -> int:
        return 1 if self.is_regression else len(self.state.fitted["classes"])

    def load_dataset(self, split: str, **kwargs) -> None:
        """Loads "train", "valid" or "test".

        Raises:
            ValueError: there is no such split, it is empty, or its data do not fit those of the
                training.
        """
        if split not in ("train", "valid", "test"):
            raise ValueError(f"split must be train, valid or test, got {split!r}")
        data = self.read("test" if split == "test" else "train")
        chosen = np.arange(len(data.series)) if split == "test" else self.parts(data)[split]
        if not len(chosen):
            raise ValueError(
                f"--validation-fraction {self.cfg.validation_fraction} leaves no case to validate "
                "on; increase it, or train with --disable-validation"
            )
        preparation = self.preparation
        self.datasets[split] = TimeSeriesDataset(
            preparation([data.series[index] for index in chosen]),
            self.targets(data.targets[chosen], data.is_regression),
            seed=self.cfg.seed if split == "train" else None,
        )

    def targets(self, targets: np.ndarray, is_regression: bool) -> Tensor:
        """Class indices, or standardised numbers."""
        fitted = self.state.fitted
        if is_regression != self.is_regression:
            kinds = ("classes", "numbers")
            raise ValueError(
                f"{self.cfg.dataset_name} has {kinds[is_regression]} as targets, but the "
                f"checkpoint was trained on {kinds[self.is_regression]}"
            )
        if is_regression:
            targets = (targets.astype(float) - fitted["target_mean"]) / fitted["target_std"]
            return torch.from_numpy(targets).float()
        unseen = sorted({str(label) for label in targets} - set(fitted["classes"]))
        if unseen:
            raise ValueError(
                f"{self.cfg.dataset_name} has labels that the training split does not have: "
                f"{', '.join(unseen)}; it has {', '.join(fitted['classes'])}"
            )
        return torch.tensor([fitted["classes"].index(str(label)) for label in targets])
