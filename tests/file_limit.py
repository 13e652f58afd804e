"""The environment of a process that may not write large files, which stands for a full disk."""

import os

ENVIRONMENT = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
"""Keeps Python from writing compiled modules under the limit.

The importer of Python 3.11 ignores a short write: the part that fits stays under the module's final name, and every
later process that imports it ends with "EOFError: marshal data too short".
"""
