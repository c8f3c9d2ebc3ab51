"""Code that several tools share: the command line's rules, a training run and its stall report."""
