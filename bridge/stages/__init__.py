"""Several checkpoints of one nanochat, over its training or its stages, and what differs between them.

`names` parses `--checkpoints`, `loading` loads the models, `sums` and `measuring` compare them through a crosscoder,
`latents` says what became of every latent, `survival` matches SAEs of single checkpoints.
"""
