"""``time_series``: classification and regression of the UEA, UCR and TSER archives' data sets."""

from argparse import ArgumentParser
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Dict, List, Optional

import numpy as np
import torch
from fairseq.data import FairseqDataset
from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import FairseqTask, register_task
from omegaconf import II, MISSING, OmegaConf
from torch import Tensor

if TYPE_CHECKING:  # aeon is installed for time series alone
    from ea_aeon.data import TimeSeries


@dataclass
class TimeSeriesConfig(FairseqDataclass):
    dataset_name: str = field(
        default=MISSING, metadata={"help": "name of the data set, for example JapaneseVowels"}
    )
    dataset_dir: Optional[str] = field(
        default=None,
        metadata={
            "help": "folder of NAME/NAME_TRAIN.ts, NAME/NAME_TEST.ts, also .ts.gz (default: what "
            "aeon brings with it or downloads)"
        },
    )
    validation_fraction: float = field(
        default=0.2, metadata={"help": "of the training split, to validate with (default: 0.2)"}
    )
    split_seed: int = field(
        default=1, metadata={"help": "seed that draws the cases to validate with (default: 1)"}
    )
    seed: int = II("common.seed")


class TimeSeriesDataset(FairseqDataset):
    """Prepared series (steps, channels) and their targets; shuffled anew in each epoch.

    Args:
        seed: of the order; None keeps that of the file.
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

    def num_tokens_vec(self, indices) -> np.ndarray:
        return self.sizes[indices]

    def size(self, index: int) -> int:
        return int(self.sizes[index])

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def ordered_indices(self) -> np.ndarray:
        if self.seed is None:
            return np.arange(len(self))
        return np.random.default_rng((self.seed, self.epoch)).permutation(len(self))

    def collater(self, samples: List[Dict]) -> Dict:
        """A batch; {} of none."""
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
    """Splits: "train" and "valid" are parts of the official training split, "test" is the official
    test split. Standardisation is fitted to "train" alone; it goes into the checkpoint, and so do
    the class labels of the official training split.
    """

    def __init__(self, cfg: TimeSeriesConfig) -> None:
        super().__init__(cfg)
        self.state.add_factory("fitted", self.fit)

    @classmethod
    def setup_task(cls, cfg: TimeSeriesConfig, **kwargs) -> "TimeSeriesTask":
        """The task. Raises ValueError if there is no data set's name."""
        if OmegaConf.is_missing(cfg, "dataset_name"):
            raise ValueError("--dataset-name is missing, for example JapaneseVowels")
        return cls(cfg)

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        """Adds the options, and defaults of fairseq-train that suit time series."""
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
        """Which cases of the official training split are train's and valid's."""
        from ea_aeon.data import split_off

        labels = None if data.is_regression else data.targets
        cfg = self.cfg
        parts = split_off(len(data.series), cfg.validation_fraction, cfg.split_seed, labels)
        return dict(zip(("train", "valid"), parts, strict=True))

    def fit(self) -> Dict:
        """What is fitted to the training cases: plain numbers and strings, for the checkpoint."""
        from ea_aeon.data import Preparation

        data = self.read("train")
        train = self.parts(data)["train"]
        preparation = Preparation.fit([data.series[index] for index in train])
        fitted = {"mean": preparation.mean, "std": preparation.std, "classes": None}
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
    def num_channels(self) -> int:
        return len(self.state.fitted["mean"])

    @property
    def num_outputs(self) -> int:
        return 1 if self.is_regression else len(self.state.fitted["classes"])

    def load_dataset(self, split: str, **kwargs) -> None:
        """Loads "train", "valid" or "test".

        Raises:
            ValueError: no such split, no cases in it, or data unlike those of the training.
        """
        from ea_aeon.data import Preparation

        if split not in ("train", "valid", "test"):
            raise ValueError(f"the splits are train, valid and test, not {split!r}")
        data = self.read("test" if split == "test" else "train")
        chosen = np.arange(len(data.series)) if split == "test" else self.parts(data)[split]
        if not len(chosen):
            raise ValueError(
                f"--validation-fraction {self.cfg.validation_fraction} leaves no case to validate "
                "with; raise it, or train with --disable-validation"
            )
        fitted = self.state.fitted
        preparation = Preparation(fitted["mean"], fitted["std"])
        self.datasets[split] = TimeSeriesDataset(
            preparation([data.series[index] for index in chosen]),
            self.targets(data.targets[chosen], data.is_regression),
            seed=self.cfg.seed if split == "train" else None,
        )

    def targets(self, targets: np.ndarray, is_regression: bool) -> Tensor:
        """Indices of classes, or numbers standardised as in training."""
        fitted = self.state.fitted
        if is_regression != self.is_regression:
            kinds = ("classes", "numbers")
            raise ValueError(
                f"{self.cfg.dataset_name} has {kinds[is_regression]} to predict, the checkpoint "
                f"was trained on {kinds[self.is_regression]}"
            )
        if is_regression:
            targets = (targets.astype(float) - fitted["target_mean"]) / fitted["target_std"]
            return torch.from_numpy(targets).float()
        unseen = sorted({str(label) for label in targets} - set(fitted["classes"]))
        if unseen:
            raise ValueError(
                f"{self.cfg.dataset_name} has labels that the training split has not: "
                f"{', '.join(unseen)}; known are {', '.join(fitted['classes'])}"
            )
        return torch.tensor([fitted["classes"].index(str(label)) for label in targets])

    def max_positions(self) -> None:
        return None

    @property
    def source_dictionary(self) -> None:
        return None

    @property
    def target_dictionary(self) -> None:
        return None
