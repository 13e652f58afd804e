"""Atomic files and folders, appended lines, locks: on a real disk, with real kills and a real full disk."""

import os
import signal
import subprocess
import sys
import textwrap

import file_limit
import pytest

from jsae import files


def run(code: str, *arguments: object, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=file_limit.ENVIRONMENT,
        capture_output=True,
        text=True,
        **kwargs,
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


HIDDEN = {
    "safetensors": "from safetensors.numpy import save_file; save_file({'a': np.zeros(9000)}, partial)",
    "torch": "import torch; file = partial.open('wb'); torch.save(torch.zeros(9000), file)",
    "numpy": "file = partial.open('wb'); np.zeros(9000).tofile(file)",
    "python": "partial.write_bytes(bytes(90_000))",
}


@pytest.mark.parametrize("library", HIDDEN)
def test_a_full_disk_in_any_library_is_reported_with_the_path(tmp_path, library):
    files.write(tmp_path / "a", "old")
    done = run(
        f"""
        import resource, signal, sys
        from pathlib import Path
        import numpy as np
        from jsae import files
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            with files.replacing(Path(sys.argv[1])) as partial:
                {HIDDEN[library]}
        except OSError as error:
            print("told", error.errno > 0, sys.argv[1] in str(error))
        """,
        tmp_path / "a",
    )
    assert "told True True" in done.stdout, done.stderr
    assert (tmp_path / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "error", [FileNotFoundError("no text at x"), ConnectionError("reset"), ValueError("not finite"), OSError("odd")]
)
def test_errors_that_are_not_of_writing_pass_as_they_are(tmp_path, error):
    with pytest.raises(type(error)) as caught, files.replacing(tmp_path / "a"):
        raise error
    assert caught.value is error


def test_a_folder_is_replaced_except_for_files_to_keep(tmp_path):
    folder = tmp_path / "made" / "scan"
    with files.replacing_folder(folder) as partial:
        (partial / "1.json").write_text("old")
        (partial / "2.json").write_text("old")
    (folder / "features").mkdir()
    for name in ("notes.txt", "features/mine", "features/layer.bin"):
        (folder / name).write_text("a person's")
    with files.replacing_folder(folder, keep=lambda file: file.suffix in ("", ".txt", ".bin")) as partial:
        assert list(partial.iterdir()) == []
        (partial / "features").mkdir()
        (partial / "features" / "layer.bin").write_text("new")
        (partial / "1.json").write_text("new")
    found = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}
    new, kept = dict.fromkeys(("1.json", "features/layer.bin"), "new"), ("features/mine", "notes.txt")
    assert found == new | dict.fromkeys(kept, "a person's")
    assert [p.name for p in folder.parent.iterdir()] == ["scan"]


def test_a_folder_of_very_many_files_is_replaced(tmp_path):
    with files.replacing_folder(tmp_path / "many") as partial:
        for number in range(200):
            (partial / f"{number}").write_text("whole")
    assert len(list((tmp_path / "many").iterdir())) == 200


def test_remains_are_known_and_cleared(tmp_path):
    for name in ("a.partial", "b.unfinished", "c.outdated", "d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / "e.json.partial").write_text("half")
    known = {path.name for path in tmp_path.iterdir() if files.is_remains(path)}
    assert known == {"a.partial", "b.unfinished", "c.outdated", "e.json.partial"}
    (tmp_path / "film.partial").touch()
    files.clear(tmp_path, "[abc]", "*.json")
    assert {path.name for path in tmp_path.iterdir()} == {"c", "d", "film.partial"}  # what was moved away is back
    assert (tmp_path / "c" / "file").read_text() == "c.outdated"


def test_system_errors_are_distinguished_from_errors_of_a_file():
    import errno
    import gzip

    for code in (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EACCES, errno.EIO):
        assert files.is_system_error(OSError(code, "no"))
    for error in (FileNotFoundError(errno.ENOENT, "no"), gzip.BadGzipFile("not gzipped"), ValueError("no")):
        assert not files.is_system_error(error)


def test_an_unfinished_line_is_kept_where_people_write_too(tmp_path):
    (tmp_path / "notes").write_text("whole\nby hand")
    with files.Lines(tmp_path / "notes", torn="keep") as lines:
        lines.append("next")
        lines.append("last")
    assert (tmp_path / "notes").read_text() == "whole\nby hand\nnext\nlast\n"


def test_bytes_are_appended_all_or_none(tmp_path):
    files.append(tmp_path / "a", b"one")
    done = run(
        """
        import resource, signal, sys
        from pathlib import Path
        from jsae import files
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            files.append(Path(sys.argv[1]), bytes(5000))
        except OSError as error:
            print("told", sys.argv[1] in str(error))
        """,
        tmp_path / "a",
    )
    assert "told True" in done.stdout, done.stderr
    files.append(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"onetwo"


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


def test_a_second_process_is_refused_with_the_holder_of_the_lock(tmp_path):
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


def test_a_lock_leaves_no_file_and_no_folder_that_it_made(tmp_path):
    with files.Lock(tmp_path / "run"), files.Lock(tmp_path / "used"):
        assert [p.name for p in (tmp_path / "run").iterdir()] == [files.LOCK]
        (tmp_path / "used" / "file").touch()
    assert [p.name for p in tmp_path.iterdir()] == ["used"]
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["file"]


def test_a_lock_has_one_holder_although_its_file_is_created_and_removed(tmp_path):
    """Processes take and leave the lock as fast as they can; each counts in a file that only the lock protects."""
    code = """
        import sys
        from pathlib import Path
        from jsae import files
        folder, done = Path(sys.argv[1]), 0
        while done < 200:
            try:
                with files.Lock(folder):
                    count = folder / "count"
                    count.write_text(str(int(count.read_text()) + 1))
                done += 1
            except files.LockedError:
                pass
    """
    (tmp_path / "count").write_text("0")
    code = textwrap.dedent(code)
    takers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [taker.wait(timeout=100) for taker in takers] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "600"


def test_the_note_of_a_killed_holder_is_not_taken_for_the_one_that_holds(tmp_path):
    """Between taking a lock and writing its own note, a process leaves the former one's."""
    import fcntl
    import json
    import socket

    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    with (tmp_path / files.LOCK).open("w") as file:
        json.dump({"pid": dead.pid, "host": socket.gethostname(), "program": "train.py"}, file)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(files.LockedError, match="in use by another process"), files.Lock(tmp_path):
            pass


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
