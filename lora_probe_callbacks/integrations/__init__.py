"""Where the probe meets frameworks that it is not written for: a runner for unchanged scripts, and thin plugins."""
