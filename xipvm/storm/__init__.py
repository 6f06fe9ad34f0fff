"""Storms: random mm operations under a running guest, and the check that they do not show."""

from xipvm.storm.storm import Storm, parse_storm

__all__ = ["Storm", "parse_storm"]
