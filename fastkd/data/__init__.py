"""Data sets, loaders, samplers and transforms."""
