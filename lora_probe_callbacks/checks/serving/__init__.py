"""Checks on what should hold the trained adapter: reloaded, merged, served, or sampling in a run."""
