"""The drawings of tools/figures.py: one module for each figure, and `plot`, which all of them use."""
