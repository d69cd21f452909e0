"""fastkd in the train loops of other libraries."""
