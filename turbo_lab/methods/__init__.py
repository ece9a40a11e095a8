"""Distillation methods: each is one file of losses and one line here."""

from __future__ import annotations

from turbo_lab.methods.consistency import Consistency
from turbo_lab.methods.continuous import ContinuousConsistency
from turbo_lab.methods.direct import Direct
from turbo_lab.methods.dmd2 import DMD2
from turbo_lab.methods.flow import FlowMatching
from turbo_lab.methods.gan import WithGan
from turbo_lab.methods.phased import phase_edges
from turbo_lab.methods.progressive import Progressive
from turbo_lab.methods.tdm import TDM
from turbo_lab.methods.transition import Transition

METHODS = {
    "flow": FlowMatching,
    "progressive": Progressive,
    "consistency": Consistency,
    "continuous": ContinuousConsistency,
    "direct": Direct,
    "transition": Transition,
    "dmd2": DMD2,
    "tdm": TDM,
}

__all__ = [
    "DMD2",
    "METHODS",
    "TDM",
    "Consistency",
    "ContinuousConsistency",
    "Direct",
    "FlowMatching",
    "Progressive",
    "Transition",
    "WithGan",
    "phase_edges",
]
