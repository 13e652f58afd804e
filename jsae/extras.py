"""Advice on the installation of optional dependencies."""


def advice(extra: str) -> str:
    """Return what to do to get the packages of an extra, as the end of an error message."""
    return f'run pip install -e ".[{extra}]" in the clone of jsae'
