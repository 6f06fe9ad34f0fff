"""Boards: memory maps, devices and device trees."""
