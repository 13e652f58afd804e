"""Atomic files and folders, appended lines, locks: on a real disk, with real kills and a real full disk."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from jsae import files


def run(code: str, *arguments: object, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], capture_output=True, text=True, **kwargs
    )


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    files.write(tmp_path / "a.json", "old")
    files.write(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def _half(path):
    path.write_text("half of it")
    raise FileNotFoundError


def test_a_file_keeps_its_content_when_writing_fails(tmp_path):
    files.write(tmp_path / "a", "old")
    with pytest.raises(FileNotFoundError), files.replacing(tmp_path / "a") as partial:
        _half(partial)
    assert (tmp_path / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path):
    """A limit on a file's size is a full disk as a process sees it."""
    files.write(tmp_path / "a", "old")
    done = run(
        """
        import resource, signal, sys
        from pathlib import Path
        from jsae import files
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            files.write(Path(sys.argv[1]), b"x" * 5000)
        except OSError as error:
            print("refused", error.errno)
        """,
        tmp_path / "a",
    )
    assert "refused" in done.stdout, done.stderr
    assert (tmp_path / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("exchange", [True, False], ids=["swapped", "renamed twice"])
def test_a_folder_is_replaced(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    for number in range(2):
        with files.replacing(tmp_path / "sae") as partial:
            partial.mkdir()
            (partial / f"{number}").write_text("whole")
    assert [p.name for p in (tmp_path / "sae").iterdir()] == ["1"]
    assert [p.name for p in tmp_path.iterdir()] == ["sae"]


def test_remains_of_a_killed_process_do_not_stop_the_next_one(tmp_path):
    for left in ("sae", "sae.outdated", "sae.partial"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "cfg.json").write_text(left)
    with files.replacing(tmp_path / "sae") as partial:
        assert (tmp_path / "sae" / "cfg.json").read_text() == "sae"
        partial.mkdir()
        (partial / "cfg.json").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["sae"]
    assert (tmp_path / "sae" / "cfg.json").read_text() == "new"


def test_a_folder_moved_away_by_a_killed_process_comes_back(tmp_path):
    (tmp_path / "sae.outdated").mkdir()
    (tmp_path / "sae.outdated" / "cfg.json").write_text("old")
    files.recover(tmp_path / "sae")
    assert (tmp_path / "sae" / "cfg.json").read_text() == "old"
    assert not (tmp_path / "sae.outdated").exists()


@pytest.mark.parametrize("exchange", [True, False], ids=["swapped", "renamed twice"])
def test_a_folder_survives_a_kill_at_every_call_of_the_system(tmp_path, exchange):
    """The process kills itself before its nth rename, sync or removal: the folder is the old or the new one, whole."""
    code = """
        import os, shutil, signal, sys
        from pathlib import Path
        from jsae import files
        path, left, exchange = Path(sys.argv[1]), [int(sys.argv[2])], sys.argv[3] == "True"
        def watched(function):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return call
        swap = files._exchange
        files._exchange = watched(swap if exchange else lambda a, b: False)
        files._sync, files._remove = watched(files._sync), watched(files._remove)
        Path.replace = watched(Path.replace)
        with files.replacing(path) as partial:
            partial.mkdir()
            for name in ("cfg.json", "weights"):
                (partial / name).write_text("new")
    """
    outcomes = set()
    for kill in range(40):
        path = tmp_path / f"{kill}" / "sae"
        path.mkdir(parents=True)
        for name in ("cfg.json", "weights"):
            (path / name).write_text("old")
        done = run(code, path, kill, exchange)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        files.recover(path)
        content = {file.name: file.read_text() for file in path.iterdir()}
        assert content in [dict.fromkeys(("cfg.json", "weights"), age) for age in ("old", "new")]
        outcomes.add((content["weights"], done.returncode))
        assert [p.name for p in path.parent.iterdir()] == ["sae"]
        if done.returncode == 0:
            break
    assert outcomes >= {("old", -signal.SIGKILL), ("new", -signal.SIGKILL), ("new", 0)}


def test_lines_are_appended_and_an_unfinished_one_is_cut_off(tmp_path):
    (tmp_path / "notes").write_bytes(b"whole\n" + b"cut o" * 40_000)
    with files.Lines(tmp_path / "notes") as lines:
        lines.append("next")
        lines.append("größer")
    assert (tmp_path / "notes").read_text().splitlines() == ["whole", "next", "größer"]
    with files.Lines(tmp_path / "notes") as lines, pytest.raises(ValueError, match="line break"):
        lines.append("a\nb")


def test_every_line_that_was_acknowledged_is_in_the_file_when_the_disk_is_full(tmp_path):
    done = run(
        """
        import resource, signal, sys
        from pathlib import Path
        from jsae import files
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with files.Lines(Path(sys.argv[1])) as lines:
            for number in range(100):
                try:
                    lines.append(f"{number:>29}")
                    print(number)
                except OSError as error:
                    assert sys.argv[1] in str(error)
        """,
        tmp_path / "notes",
    )
    kept = (tmp_path / "notes").read_text().splitlines()
    assert done.stdout.split() == [line.strip() for line in kept]
    assert len(kept) == 33


def test_lines_of_several_processes_do_not_mix(tmp_path):
    code = """
        import sys
        from pathlib import Path
        from jsae import files
        for number in range(50):
            with files.Lines(Path(sys.argv[1]), sync=False) as lines:
                lines.append(sys.argv[2] * 5000)
    """
    writers = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "n"), letter]) for letter in "abc"
    ]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0, 0]
    lines = (tmp_path / "n").read_text().splitlines()
    assert sorted(lines) == [letter * 5000 for letter in "abc" for _ in range(50)]


def test_an_exclusive_writer_of_lines_keeps_others_out(tmp_path):
    with files.Lines(tmp_path / "n", exclusive=True), pytest.raises(BlockingIOError):
        files.Lines(tmp_path / "n", exclusive=True)
    with files.Lines(tmp_path / "n", exclusive=True) as lines:
        lines.append("free again")


HOLD = """
    import sys, time
    from pathlib import Path
    from jsae import files
    with files.Lock(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
"""


def test_a_second_process_is_refused_and_told_who_holds_the_folder(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD), str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(files.LockedError, match=f"in use by process {holder.pid} on"), files.Lock(tmp_path / "run"):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with files.Lock(tmp_path / "run"):  # the lock of a killed process is no lock
        assert str(os.getpid()) in (tmp_path / "run" / files.LOCK).read_text()


def test_a_lock_may_be_taken_twice_in_one_process_and_ends_with_the_last(tmp_path):
    code = "import sys; from pathlib import Path; from jsae import files; files.Lock(Path(sys.argv[1])).__enter__()"
    with files.Lock(tmp_path):
        with files.Lock(tmp_path / "." / ""):
            pass
        assert "LockedError" in run(code, tmp_path).stderr
    assert run(code, tmp_path).returncode == 0


def test_a_folder_without_locks_is_warned_of(tmp_path, monkeypatch):
    import errno
    import fcntl

    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="without locks"), files.Lock(tmp_path):
        pass


def test_nothing_is_imported_beyond_the_standard_library():
    done = run("import sys; from jsae import files; print([m for m in ('numpy', 'jax', 'torch') if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr
