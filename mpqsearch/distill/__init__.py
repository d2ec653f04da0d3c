"""Distillation of a quantized student: teacher trajectories, the relation loss, and the loop."""

from mpqsearch._verbs import make_callable
from mpqsearch.distill.loop import DistillState, distill
from mpqsearch.distill.processes import Processes, processes
from mpqsearch.distill.teacher import CachedTrajectories, TeacherSource, TeacherStep, Trajectories
from mpqsearch.distill.trd import (
    FeatureTap,
    TimeSmoothedRelations,
    find_feature_module,
    pool_positions,
    relation_log_probabilities,
    relation_loss,
)
from mpqsearch.specs import DistillSpec, TRDSpec

__all__ = [
    "CachedTrajectories",
    "DistillSpec",
    "DistillState",
    "FeatureTap",
    "Processes",
    "TRDSpec",
    "TeacherSource",
    "TeacherStep",
    "TimeSmoothedRelations",
    "Trajectories",
    "distill",
    "find_feature_module",
    "pool_positions",
    "processes",
    "relation_log_probabilities",
    "relation_loss",
]

make_callable(__name__)
