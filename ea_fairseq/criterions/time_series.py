"""The criterion of the ``time_series`` task: cross-entropy or mean squared error, and metrics."""

import math
from typing import Dict, List, Tuple

from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from torch import Tensor
from torch.nn import functional as F


@register_criterion("time_series", dataclass=FairseqDataclass)
class TimeSeriesCriterion(FairseqCriterion):
    """Classification: cross-entropy in nats, `accuracy` in per cent. Regression: mean squared error
    of the standardised target, `rmse` in the target's own unit."""

    def __init__(self, task) -> None:
        super().__init__(task)
        self.is_regression = task.is_regression
        self.unit = task.state.fitted["target_std"] if task.is_regression else 1.0

    def forward(self, model, sample: Dict, reduce: bool = True) -> Tuple[Tensor, int, Dict]:
        """The summed loss, the number of cases, and the values to log."""
        output, target = model(**sample["net_input"]).float(), sample["target"]
        logging_output = {
            "nsentences": sample["nsentences"],
            "ntokens": sample["ntokens"],
            "sample_size": sample["nsentences"],
        }
        if self.is_regression:
            loss = F.mse_loss(output[:, 0], target, reduction="sum")
            logging_output["squared_error"] = loss.data * self.unit**2
        else:
            loss = F.cross_entropy(output, target, reduction="sum")
            logging_output["correct"] = (output.argmax(dim=1) == target).sum()
        logging_output["loss"] = loss.data
        return loss, sample["nsentences"], logging_output

    @classmethod
    def reduce_metrics(cls, logging_outputs: List[Dict]) -> None:
        """Logs `loss`, and `accuracy` or `rmse`."""

        def total(name: str) -> float:
            return sum(float(log.get(name, 0)) for log in logging_outputs)

        cases = total("nsentences")
        metrics.log_scalar("loss", total("loss") / cases, cases, round=4)
        if any("correct" in log for log in logging_outputs):
            metrics.log_scalar("accuracy", 100 * total("correct") / cases, cases, round=2)
        else:
            metrics.log_scalar("mse", total("squared_error") / cases, cases)
            metrics.log_derived("rmse", lambda meters: math.sqrt(meters["mse"].avg))

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True
