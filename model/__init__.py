"""The network of 2012, its two recipes, its trainer and its checkpoints; imports nothing from `pipeline`."""
