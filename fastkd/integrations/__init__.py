"""fastkd in other trainers' loops: one module for each framework."""
