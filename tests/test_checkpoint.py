"""Checkpoints on a real disk: nothing damaged is used, no more is kept than promised, whatever happened before."""

import functools
import gc
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import file_limit
import jax
import numpy as np
import pytest

from jsae import loop
from jsae.architectures import sae_config
from jsae.checkpoint import Checkpoints
from jsae.config import TrainConfig
from jsae.manifest import DamagedError
from jsae.settings import ConfigError

SAE, RUN = sae_config("topk", 32, 64, k=4), TrainConfig(num_activations=1000, batch_size=100)
NOTES = {"cursor": {"block": 1, "batch": 2, "position": {"row": 7}}}


@pytest.fixture
def orbax_fails() -> Iterator[None]:
    """Drops what Orbax leaves behind where it fails, unfinished coroutines and late callbacks, as a command does."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        yield
        gc.collect()
    sys.unraisablehook = hook


@functools.cache
def states(seed: int) -> loop.States:
    return loop.init([loop.Member(SAE, RUN)], (jax.random.normal(jax.random.key(seed), (100, 32)),))


def same(a: object, b: object) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def save(folder: Path, *fvus: float, start: int = 1) -> None:
    """Saves a step for every fvu; the states of step s are those of seed s."""
    with Checkpoints(folder) as checkpoints:
        for step, fvu in enumerate(fvus, start):
            checkpoints.save(step, states(step), NOTES, fvu)


def restored(folder: Path, **kwargs):
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(jax.eval_shape(lambda: states(1)), **kwargs)


def kept(folder: Path) -> list[str]:
    return sorted((p.name for p in folder.iterdir()), key=lambda name: (len(name), name))


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    save(folder, 0.5, 0.4)
    return folder


def all_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# ---- damage --------------------------------------------------------------------------------------------------------


def flip(data: bytes) -> bytes:
    place = len(data) // 2
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "a flipped bit in the middle": flip,
    "a flipped bit at the end": lambda data: data[:-1] + bytes([data[-1] ^ 0x80]),
    "a page of zeros": lambda data: bytes(min(len(data), 4096)) + data[4096:],
    "a truncated file": lambda data: data[: len(data) // 2],
    "a longer file": lambda data: data + b" ",
    "an empty file": lambda data: b"",
    "a missing file": lambda data: None,
}


@contextmanager
def damaged(path: Path, how: str) -> Iterator[None]:
    whole = path.read_bytes()
    data = DAMAGES[how](whole)
    path.unlink() if data is None else path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_to_any_file_is_named_and_the_checkpoint_before_is_used(how, two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "checkpoints")
    files = all_files(folder / "2")
    assert len(files) > 10
    for path in files:
        if not path.stat().st_size:
            continue  # nothing in it to damage; the test of additional and missing files has it
        with damaged(path, how):
            if path.name == "manifest.json" and how == "a missing file":
                continue  # as after a kill: below
            with pytest.raises(DamagedError) as error:
                restored(folder, step=2)
            assert str(path) in str(error.value)
            found = restored(folder)
            assert (found.step, [d.step for d in found.damaged]) == (1, [2])
            assert str(path) in found.damaged[0].reason
            assert same(found.states, states(1))
            assert kept(folder) == ["1", "2.damaged"]
            (folder / "2.damaged").rename(folder / "2")
    found = restored(folder)
    assert (found.step, found.notes, found.damaged) == (2, NOTES, ())
    assert same(found.states, states(2))


@pytest.mark.usefixtures("orbax_fails")
@pytest.mark.parametrize("how", DAMAGES)
def test_without_a_list_of_files_the_checksums_of_the_arrays_notice_what_matters(how, two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "checkpoints")
    (folder / "2" / "manifest.json").unlink()
    noticed = 0
    for path in all_files(folder / "2"):
        with damaged(path, how):
            found = restored(folder)
            assert same(found.states, states(found.step))
            assert found.notes == NOTES
            if found.step == 1:
                assert str(folder / "2") in found.damaged[0].reason
                noticed += 1
                (folder / "2.damaged").rename(folder / "2")
    assert noticed >= (1 if how == "a longer file" else 5)  # what stands behind the end is not read


def test_every_bit_of_the_notes_counts_without_a_list_of_files(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "checkpoints")
    (folder / "2" / "manifest.json").unlink()
    path = folder / "2" / "notes" / "metadata"
    whole = path.read_bytes()
    for place in range(0, len(whole), 41):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(DamagedError, match="notes/metadata"):
            restored(folder, step=2)


def test_without_an_intact_checkpoint_every_reason_is_reported_and_nothing_is_moved(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "checkpoints")
    (folder / "1" / "notes" / "metadata").unlink()
    (path := folder / "2" / "states" / "_METADATA").write_bytes(flip(path.read_bytes()))
    with pytest.raises(DamagedError) as error:
        restored(folder)
    told = str(error.value)
    assert "step 2:" in told
    assert f"{path} is damaged" in told
    assert "step 1:" in told
    assert "remove it to start from the first step" in told
    assert "\n" not in told
    assert kept(folder) == ["1", "2"]


STRANGE = {
    "deeply nested JSON": b"[" * 200_000,
    "JSON of another type": b"[1, 2]",
    "JSON without an end": b'{"a": ',
    "no text": b"\xff\xfe\x00",
    "a number of many digits": b"9" * 10_000,
}


@pytest.mark.usefixtures("orbax_fails")
@pytest.mark.parametrize("listed", [True, False], ids=["with a list of files", "without"])
@pytest.mark.parametrize("what", STRANGE)
def test_other_content_of_a_json_file_is_damage_in_one_line(what, listed, two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "checkpoints")
    names = ["_CHECKPOINT_METADATA", "notes/metadata", "states/_METADATA", "states/_sharding", "manifest.json"]
    if not listed:
        (folder / "2" / "manifest.json").unlink()
    for name in names if listed else names[:-1]:
        path = folder / "2" / name
        whole = path.read_bytes()
        path.write_bytes(STRANGE[what])
        found = restored(folder)
        assert same(found.states, states(found.step))
        if listed or name == "notes/metadata":
            assert found.step == 1
        if found.step == 1:
            assert "\n" not in found.damaged[0].reason
            (folder / "2.damaged").rename(folder / "2")
        path.write_bytes(whole)


def test_an_additional_file_a_link_and_a_pipe_are_damage(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "checkpoints")
    path = folder / "2" / "states" / "_METADATA"
    (more := folder / "2" / "states" / "more").touch()
    with pytest.raises(DamagedError, match=f"{more} is not in the list of files"):
        restored(folder, step=2)
    more.unlink()
    (folder / "2" / ".DS_Store").touch()  # a file manager was here
    assert restored(folder, step=2).step == 2
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DamagedError, match=f"{path} is not a file"):
        restored(folder, step=2)
    path.unlink()
    path.symlink_to(folder)
    with pytest.raises(DamagedError, match=f"{path} is not a file"):
        restored(folder, step=2)


def test_an_empty_folder_of_a_step_is_damage(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "checkpoints")
    (folder / "3").mkdir()
    found = restored(folder)
    assert (found.step, found.damaged[0].step) == (2, 3)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_other_folders_are_neither_used_nor_removed(what, two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "checkpoints")
    mine = folder / "2024"
    if what == "file":
        mine.write_text("mine")
    else:
        mine.mkdir()
        (mine / "thesis.tex").write_text("mine")
    for act in (lambda: restored(folder), lambda: save(folder, 0.1, start=3)):
        with pytest.raises(OSError, match=f"{mine} is not a checkpoint"):
            act()
    assert kept(folder) == ["1", "2", "2024"]


def test_a_file_without_read_permission_is_not_reported_as_damaged(two, tmp_path, monkeypatch):
    folder = shutil.copytree(two, tmp_path / "checkpoints")
    opened = Path.open

    def refuse(path: Path, *args, **kwargs):
        if path.name == "_METADATA":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match="_METADATA"):
        restored(folder)
    assert kept(folder) == ["1", "2"]


def test_a_checkpoint_of_an_earlier_version_is_refused_by_name(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "checkpoints")
    shutil.rmtree(folder / "1")
    (folder / "2" / "manifest.json").unlink()
    (folder / "2" / "notes" / "metadata").write_text(json.dumps(NOTES))
    with pytest.raises(DamagedError, match="earlier version"):
        restored(folder)


def test_states_of_another_configuration_are_refused_with_the_array(two):
    narrow = loop.init(
        [loop.Member(sae_config("topk", 32, 48, k=4), RUN)], (jax.random.normal(jax.random.key(0), (100, 32)),)
    )
    with_average = TrainConfig(num_activations=1000, batch_size=100, average_fraction=0.1)
    averaged = loop.init([loop.Member(SAE, with_average)], (jax.random.normal(jax.random.key(0), (100, 32)),))
    with Checkpoints(two) as checkpoints:
        with pytest.raises(ConfigError, match=r"the array .*W_dec.* is float32\[64, 32\] there and must be .*48, 32\]"):
            checkpoints.restore(narrow)
        with pytest.raises(ConfigError, match=r"average.* is absent there and must be float32"):
            checkpoints.restore(averaged)
    assert kept(two) == ["1", "2"]


# ---- what is kept --------------------------------------------------------------------------------------------------


def test_the_last_two_and_the_best_are_kept_over_any_number_of_sessions(tmp_path):
    folder = tmp_path / "checkpoints"
    fvus = [0.9, 0.3, 0.8, 0.7, 0.6, 0.5, 0.2, 0.4, 0.9, 0.9]
    for session, fvu in enumerate(fvus):
        with Checkpoints(folder) as checkpoints:
            if session:
                checkpoints.restore(states(1))
            for step in (5 * session + 1, 5 * session + 4):
                checkpoints.save(step, states(step), NOTES, fvu + 0.01 * (step % 5))
        best = 1 + 5 * int(np.argmin(fvus[: session + 1]))
        assert kept(folder) == [str(s) for s in sorted({best, 5 * session + 1, 5 * session + 4})]
    found = restored(folder)
    assert same(found.states, states(5 * 9 + 4))


def test_a_session_that_saves_nothing_clears_what_earlier_ones_left(two, tmp_path):
    folder = tmp_path / "checkpoints"
    for step in range(1, 7):  # as if every session had been killed before it could remove anything
        save(tmp_path / str(step), 1 / step if step != 3 else 0.0, start=step)
        shutil.copytree(tmp_path / str(step) / str(step), folder / str(step))
    shutil.copytree(folder / "6", folder / "7.orbax-checkpoint-tmp")
    shutil.copytree(folder / "6", folder / "8.orbax-checkpoint-tmp-123")
    shutil.rmtree(folder / "2" / "states")  # killed while it was being removed
    (folder / "4" / "notes" / "metadata").unlink()
    assert restored(folder).step == 6
    assert kept(folder) == ["3", "5", "6"]


def test_a_metric_of_nan_is_never_the_best(tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder, float("nan"), 0.5, 0.6, 0.7)
    save(folder, float("nan"), float("nan"), start=5)
    assert kept(folder) == ["2", "5", "6"]


def test_of_damaged_checkpoints_the_latest_two_are_kept(tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder, 0.1)
    for step in (2, 3, 4, 10):
        save(folder, 0.5, start=step)
        (folder / str(step) / "notes" / "metadata").unlink()
        assert restored(folder).step == 1
    assert kept(folder) == ["1", "4.damaged", "10.damaged"]
    save(folder, 0.5, start=10)  # a step that was damaged is saved again
    assert restored(folder).step == 10
    (folder / "10" / "notes" / "metadata").unlink()
    assert restored(folder).step == 1
    assert kept(folder) == ["1", "4.damaged", "10.damaged"]


# ---- writing -------------------------------------------------------------------------------------------------------


FULL = """
import resource, sys
from pathlib import Path
from jsae.checkpoint import Checkpoints
from test_checkpoint import NOTES, states

folder, size = Path(sys.argv[1]), int(sys.argv[2])
with Checkpoints(folder) as checkpoints:
    checkpoints.restore(states(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # as a full disk, for files beyond a size
    try:
        checkpoints.save(3, states(3), NOTES, 0.3)
        checkpoints.wait()
    except OSError as error:
        print(error)
"""


@pytest.mark.parametrize("size", [100, 1000, 5000])
def test_a_full_disk_is_one_error_and_leaves_the_checkpoints_before(size, tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder, 0.5, 0.4)
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", FULL, folder, str(size)],
        env={**file_limit.ENVIRONMENT, "PYTHONPATH": f"{here.parent}:{here}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.startswith(f"the checkpoint of step 3 could not be written to {folder}: "), done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert [name for name in kept(folder) if name.isdigit()] == ["1", "2"]
    save(folder, 0.3, start=3)
    assert kept(folder) == ["2", "3"]
    assert same(restored(folder).states, states(3))


def test_notes_are_saved_as_they_are_at_that_moment_and_as_json(tmp_path):
    folder = tmp_path / "checkpoints"
    notes = {"a": (1, 2), 10: [0.1, None], 9: {}}
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, states(1), notes, 0.5)
        notes["a"] = 3
    assert restored(folder).notes == {"a": [1, 2], "10": [0.1, None], "9": {}}


def test_an_error_for_a_missing_checkpoint_lists_those_that_exist(two, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7 .* there are \[1, 2\]"):
        restored(two, step=7)
    with pytest.raises(FileNotFoundError, match=r"there are \[\]"):
        restored(tmp_path / "none")
