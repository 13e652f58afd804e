"""Train sparse autoencoders on the activations of a nanochat and export them for torch and SAELens.

    python -m experiments.train --flagfile=experiments/configs/demo.flags

A run that was stopped or killed continues with the same flags and --resume, and gives the same numbers. A run that is
asked to stop (Ctrl-C, SIGTERM) saves and exits with code 75, so that scripts do not continue without its result.
"""

import shlex
import sys

from bridge import launch
from bridge.run import Run, commands
from bridge.training import RunConfig, Stopped, train
from experiments import flags, signals


def main(config: RunConfig) -> int:
    """Train, export and measure; return the exit code."""
    try:
        train(config, stop_requests=signals.stop_requests)
    except Stopped:
        from jsae import processes

        if launch.is_first():
            command = shlex.join(word for word in sys.argv[1:] if word not in ("--resume", "--resume=true"))
            print(f"stopped and saved; continue with: python -m experiments.train {command} --resume", flush=True)
        processes.wait_for_all()  # a launcher ends all when one of them ends
        return signals.STOPPED
    return 0


def next_commands(config: RunConfig) -> list[str]:
    """Return what to do next with the run, or with the first run of a sweep."""
    first = config.variant_name(next(config.variants()))
    run = Run(config.output_dir).path / first
    return commands.after_stages(run) if config.stages else commands.after_training(run)


if __name__ == "__main__":
    flags.run(RunConfig, main, after=next_commands)
