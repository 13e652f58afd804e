"""What `experiments.bench` measures: a module with a Config and a main for each."""
