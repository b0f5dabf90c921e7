"""Latency measurement: load, statistics, and the state of the machine."""
