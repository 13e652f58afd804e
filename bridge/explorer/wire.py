"""Neuronpedia."""

from starlette.routing import Route

from bridge.explorer.session import Session


def routes(session: Session) -> list[Route]:
    """None yet."""
    return []
