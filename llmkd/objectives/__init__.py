"""The table of objectives: (student, teacher, batch) -> Loss."""

from __future__ import annotations

from llmkd.objectives.base import Mix, Objective, RowObjective
from llmkd.objectives.cross_entropy import CrossEntropy
from llmkd.objectives.decoupled import DKD, NKD
from llmkd.objectives.hidden_mse import HiddenMSE
from llmkd.objectives.ofa import OFA
from llmkd.objectives.ps_kd import PSKD
from llmkd.objectives.regression import Regression
from llmkd.objectives.sinkhorn import SinKD
from llmkd.objectives.span import SpanLoss
from llmkd.objectives.token import TokenDistill
from llmkd.objectives.uskd import USKD

OBJECTIVES: dict[str, type[Objective]] = {
    "token": TokenDistill,
    "cross_entropy": CrossEntropy,
    "sinkd": SinKD,
    "dkd": DKD,
    "nkd": NKD,
    "ofa": OFA,
    "ps_kd": PSKD,
    "span": SpanLoss,
    "uskd": USKD,
    "hidden_mse": HiddenMSE,
    "regression": Regression,
}

__all__ = ["DKD", "NKD", "OBJECTIVES", "OFA", "PSKD", "USKD", "CrossEntropy", "HiddenMSE", "Mix", "Objective", "Regression",
           "RowObjective", "SinKD", "SpanLoss", "TokenDistill"]  # fmt: skip
