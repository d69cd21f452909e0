"""Measurements that add up over batches of tokens; tensors only."""
