"""The rules: one file for each thing that can go wrong. They judge facts and never touch torch."""
