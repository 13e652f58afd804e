"""Parse the checkpoints that one crosscoder reads: `base=…/base_checkpoints/d12,sft=…/chatsft_checkpoints/d12@800`."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from bridge.locations import STAGE
from jsae.settings import require

MOST = 256
"""Checkpoints that are read together."""
_FOLDERS = {  # in which nanochat writes its stages, in their order
    "base_checkpoints": 0,
    "mid_checkpoints": 1,
    "sft_checkpoints": 2,
    "chatsft_checkpoints": 2,
    "rl_checkpoints": 3,
    "chatrl_checkpoints": 3,
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Stage(NamedTuple):
    """A checkpoint among several."""

    name: str
    """Given, or that of its folder with the step."""
    path: str
    step: int | None
    """None is the last one."""

    @property
    def location(self) -> str:
        """The checkpoint, for messages."""
        return self.path if self.step is None else f"{self.path}@{self.step}"


def parse(items: Sequence[str]) -> tuple[Stage, ...]:
    """Return the checkpoints of `--checkpoints`, in their order.

    Args:
      items: `[NAME=]PATH[@STEP]` each, or the number of another step of the path before.

    Raises:
      ConfigError: fewer than two, a step without a path, steps of one path that do not increase, stages in another
        order than nanochat trains them, a name that is no name of a folder, or two checkpoints of one name.
    """
    stages: list[Stage] = []
    for item in items:
        if item.isascii() and item.isdecimal():
            require(
                bool(stages) and stages[-1].step is not None,
                f"--checkpoints: {item} is a step without a path: give PATH@STEP,STEP,STEP",
            )
            require(len(item) <= 18, f"--checkpoints: {item[:40]} is no step")
            stages.append(_stage(None, stages[-1].path, int(item)))
        else:
            parts = STAGE.fullmatch(item)
            require(parts is not None and bool(parts["path"]), f"--checkpoints: {item!r:.80} is not [NAME=]PATH[@STEP]")
            assert parts is not None  # for mypy
            stages.append(_stage(parts["name"], parts["path"], int(parts["step"]) if parts["step"] else None))
    given = f"--checkpoints={','.join(items)}"
    require(2 <= len(stages) <= MOST, f"{given:.200} names {len(stages)} checkpoint(s): give 2 to {MOST}")
    _check_steps(stages)
    _check_order(stages)
    for stage in stages:
        require(
            _NAME.fullmatch(stage.name) is not None,
            f"--checkpoints: {stage.name!r:.80} is no name: letters, digits and . _ - make one, as in base=PATH",
        )
        same = [other.location for other in stages if other.name == stage.name]
        require(
            len(same) == 1,
            f"--checkpoints: {' and '.join(same)} have the name {stage.name!r}: give others, as in base=PATH,sft=PATH",
        )
    return tuple(stages)


def _stage(name: str | None, path: str, step: int | None) -> Stage:
    folder = path.rstrip("/").rpartition("/")[2]
    return Stage(name or (folder if step is None else f"{folder}-{step}"), path, step)


def _check_steps(stages: Sequence[Stage]) -> None:
    """Check that steps of one path follow each other in time."""
    last: dict[str, int] = {}
    for stage in stages:
        if stage.step is None:
            continue
        before = last.get(stage.path)
        require(
            before is None or stage.step != before,
            f"--checkpoints names step {stage.step} of {stage.path} twice",
        )
        require(
            before is None or stage.step > before,
            f"--checkpoints: step {stage.step} of {stage.path} comes after step {before}: name them in their order",
        )
        last[stage.path] = stage.step


def _check_order(stages: Sequence[Stage]) -> None:
    """Check that stages whose folders nanochat named follow each other as it trains them."""
    latest: tuple[int, Stage] | None = None
    for stage in stages:
        ranks = [rank for folder, rank in _FOLDERS.items() if folder in stage.path.split("/")]
        if not ranks:
            continue
        if latest is not None:
            require(
                ranks[0] >= latest[0],
                f"--checkpoints: {stage.location} is no successor of {latest[1].location}: name base, mid, SFT and RL "
                "in the order in which they were trained",
            )
        latest = ranks[0], stage
