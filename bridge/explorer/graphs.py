"""Attribution graphs beside the explorer's page, which shows them from the disk.

    explorer/graphs/list.js           the graphs, the latest first: name, prompt and sizes
             graphs/SLUG.graph.js     a graph in the format of Neuronpedia, metadata, qParams, nodes and links

Like the other data files of the page (`bridge.explorer.page`) each calls `jsae.put(name, data)`.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge.graph_names import check_slug
from bridge.run import Run
from jsae import files, jsons

LIST = "list"
_MOST = 500
"""Graphs in the list."""
_FILE = re.compile(r'jsae\.put\("[^"]*",(?P<data>.*)\);\n', re.DOTALL)


def add(run: Run, document: Mapping[str, Any]) -> None:
    """Put a graph beside the page of a run; one of the same name is replaced.

    Args:
      run: the run of the transcoders.
      document: a graph that `bridge.circuits.graph_check` accepts.

    Raises:
      ValueError: the list of graphs that is there is broken.
      OSError: a file cannot be written.
    """
    metadata = document["metadata"]
    slug = metadata["slug"]
    check_slug(slug)
    entry = {
        "slug": slug,
        "prompt": metadata["prompt"],
        "tokens": len(metadata["prompt_tokens"]),
        "nodes": len(document["nodes"]),
        "links": len(document["links"]),
    }
    others = [other for other in listed(run) if other["slug"] != slug]
    _write(run, f"{slug}.graph", document)
    _write(run, LIST, [entry, *others][:_MOST])


def listed(run: Run) -> list[dict[str, Any]]:
    """Return the entries of the list, the latest first; [] if there is none.

    Raises:
      ValueError: it is broken.
    """
    path = _path(run, LIST)
    if not path.is_file():
        return []
    jsons.check_size(path)
    match = _FILE.fullmatch(path.read_text(encoding="utf-8", errors="replace"))
    try:
        entries = jsons.loads(match["data"]) if match else None
    except ValueError:
        entries = None
    if not isinstance(entries, list) or not all(isinstance(e, dict) and "slug" in e for e in entries):
        raise ValueError(f"{path} is no list of graphs: move it away")
    return entries


def write_empty(run: Run) -> None:
    """Write an empty list where there is none: a page from disk cannot ask whether a file exists."""
    if not _path(run, LIST).is_file():
        _write(run, LIST, [])


def script(name: str, data: Any) -> str:
    """Return a data file of the page, in ASCII."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'jsae.put("{name}",{text});\n'


def _path(run: Run, name: str) -> Path:
    return run.shown_graphs_folder / f"{name}.js"


def _write(run: Run, name: str, data: Any) -> None:
    path = _path(run, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, script(f"../{path.parent.name}/{name}", data))
