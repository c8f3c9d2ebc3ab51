"""Draws a small synthetic dataset in ILSVRC2012's own file formats, for use when ImageNet is not at hand."""
