"""Replay routing events through cache policies, predictors and prefetch planners, with bounds beside."""

from gangline.traces.simulator.bounds import Bound, belady, belady_per_layer, distinct_experts, fewest_bytes
from gangline.traces.simulator.level import LevelSpec
from gangline.traces.simulator.machine import Line, SimLink, SimMachine
from gangline.traces.simulator.report import Bounds, SimReport, make_report
from gangline.traces.simulator.run import Copies, InPlace, Run, Setup, simulate

__all__ = [
    "Bound",
    "Bounds",
    "Copies",
    "InPlace",
    "LevelSpec",
    "Line",
    "Run",
    "Setup",
    "SimLink",
    "SimMachine",
    "SimReport",
    "belady",
    "belady_per_layer",
    "distinct_experts",
    "fewest_bytes",
    "make_report",
    "simulate",
]
