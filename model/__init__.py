"""The 2012 network, its recipes and its trainer. Never imports `pipeline`."""
