"""The life of a run: when to look, what to conclude, whom to tell."""
