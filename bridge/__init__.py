"""Where PyTorch is: nanochat, its hooks, the hand-over to JAX and the exported torch SAEs."""
