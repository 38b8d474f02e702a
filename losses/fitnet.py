"""FitNet: the teacher's feature as a hint (Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015)."""
from __future__ import annotations

from torch import Generator, Tensor

from losses.core import Batch, Distiller, Needs, NetInfo, OptionGroup, RunFacts, Term, register
from losses.core.feature_losses import CriterionFitNet


@register("fitnet")
class FitNet(Distiller):
    """The head maps of both networks through :class:`CriterionFitNet`."""
    title = "feature hint through a 1x1 convolution"
    paper = "Romero et al., FitNets: Hints for Thin Deep Nets"
    year = 2015
    cost = "one 1x1 conv"
    terms = (Term("fitnet", 0.0, "weight of FitNet's squared error between the head maps"),)
    needs = Needs.both("head", same_stride=True)
    preset = {"*": {"lambda_kd": 1.0, "lambda_fitnet": 10.0}}  # train_scripts of CIRKD (Cityscapes)

    def __init__(self, options: OptionGroup, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> None:
        super().__init__()
        self.criterion = CriterionFitNet(student.channels["head"], teacher.channels["head"])

    def forward(self, batch: Batch, generator: Generator | None = None) -> dict[str, Tensor]:
        return {"fitnet": self.criterion(batch.student.head, batch.teacher.head)}
