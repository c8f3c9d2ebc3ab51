"""The data loader: a shard set in, augmented batches of training crops or evaluation views out, by way of DALI."""
