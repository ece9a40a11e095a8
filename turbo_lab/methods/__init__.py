"""Distillation methods: each is one file of losses and one line here."""

from __future__ import annotations

from turbo_lab.methods.flow import FlowMatching

METHODS = {
    "flow": FlowMatching,
}

__all__ = ["METHODS", "FlowMatching"]
