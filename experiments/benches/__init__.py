"""The measurements of `experiments.bench`: one module each, with a Config and a main."""
