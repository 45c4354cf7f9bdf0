"""Metrics, console, record: writes what the session found, and nothing else."""
