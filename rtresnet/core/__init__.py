"""Shared foundations: errors, artifacts, files, hardware, preprocessing, metrics."""
