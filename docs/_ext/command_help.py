"""A directive that shows what a command's `--help` says, so that the reference cannot differ from the command."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]


class CommandHelp(Directive):
    """`{command-help} experiments.train`: the output of `python -m experiments.train --help`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return one literal block."""
        environment = os.environ | {"COLUMNS": "84", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", self.arguments[0], "--help"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        return [nodes.literal_block(done.stdout, done.stdout, language="text")]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
