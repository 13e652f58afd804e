"""What every latent fires on: gathered into records, shown on a page, served beside the running model."""
