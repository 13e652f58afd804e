"""Gather what every latent fires on into records and show them on a page."""
