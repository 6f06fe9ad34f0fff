"""Searching the interleavings: scenarios, strategies, replay, shrinking."""

from xipvm.explore.choices import Choice, DriftError
from xipvm.explore.explorer import Failure, Run, Search, explore, replay, run_once
from xipvm.explore.scene import Scenario, Scene, scenario
from xipvm.explore.shrink import shrink
from xipvm.explore.strategies import STRATEGIES, strategy

__all__ = [
    "STRATEGIES",
    "Choice",
    "DriftError",
    "Failure",
    "Run",
    "Scenario",
    "Scene",
    "Search",
    "explore",
    "replay",
    "run_once",
    "scenario",
    "shrink",
    "strategy",
]
