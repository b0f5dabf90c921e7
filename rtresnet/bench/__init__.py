"""Latency that can be defended: load, statistics, and what machine it was."""
