"""Record the activations of latents on a text: counts, histograms, top examples and correlations. numpy only.

`Recorder` gathers them; `store` writes and reads them as folders of columns.
"""
