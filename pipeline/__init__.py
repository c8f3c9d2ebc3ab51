"""The input side: ImageNet to shards, eigenbasis and batches, and the stall report. Never imports `model`."""
