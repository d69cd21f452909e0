"""The parts of `fastkd.data.shards`: what is written, by whom, and how far it has come."""
