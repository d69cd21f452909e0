"""Load models from any source; evaluate them, and predict classes."""
