"""Distillation of a quantized student: teacher trajectories, the relation loss, and the loop."""

from mpqsearch._verbs import make_callable
from mpqsearch.distill.loop import DistillState, distill
from mpqsearch.distill.processes import Processes, processes
from mpqsearch.distill.teacher import TeacherCall, Trajectories
from mpqsearch.distill.trd import (
    find_feature_module,
    relation_loss,
    window_relation_loss,
)
from mpqsearch.specs import DistillSpec, TRDSpec

__all__ = [
    "DistillSpec",
    "DistillState",
    "Processes",
    "TRDSpec",
    "TeacherCall",
    "Trajectories",
    "distill",
    "find_feature_module",
    "processes",
    "relation_loss",
    "window_relation_loss",
]

make_callable(__name__)
