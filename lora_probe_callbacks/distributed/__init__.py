"""How the ranks of a run come to one decision."""
