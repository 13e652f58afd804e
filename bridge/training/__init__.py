"""Train SAEs on the activations of a nanochat."""
