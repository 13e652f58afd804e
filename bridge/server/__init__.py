"""Serve a run in the browser: its page, live requests to the model, and Neuronpedia's inference API."""
