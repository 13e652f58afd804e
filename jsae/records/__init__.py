"""Record what latents do on a text: counts, histograms, top examples and correlations, kept in a folder of columns.

`Recorder` gathers, `store` writes and reads. numpy only.
"""
