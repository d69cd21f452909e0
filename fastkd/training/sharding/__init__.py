"""The parts of `fastkd.training.shards`: what is written, by whom, and how far it has come."""
