"""Reads ImageNet in every layout in which it is distributed, without unpacking it; start with `source.open_source`."""
