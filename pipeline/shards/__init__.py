"""Shard sets: transcode ImageNet's images, write them into tar shards, and open, verify and repair the result."""
