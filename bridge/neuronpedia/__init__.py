"""Neuronpedia: its bulk export, SAEDashboard's batches, the upload and a local database."""
