"""The one function that writes the files of the commands: whole, alone, and refused before the work where it cannot."""

import errno
import os
import resource
import stat
import sys
import tempfile
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from fusedonemoe import files

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="devices, owners and limits as Linux has them")
SOMEBODY_ELSE = 65534


@contextmanager
def no_root():
    """A folder of a user for whom permissions count; root may write everything."""
    with tempfile.TemporaryDirectory() as name:
        is_root = os.geteuid() == 0
        if is_root:
            os.chown(name, SOMEBODY_ELSE, SOMEBODY_ELSE)
            os.seteuid(SOMEBODY_ELSE)
        try:
            yield Path(name)
        finally:
            os.chmod(name, 0o700)
            if is_root:
                os.seteuid(0)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_file_gets_what_the_umask_leaves_and_its_folder_is_made(tmp_path):
    file = tmp_path / "a" / "b" / "f"
    before = os.umask(0o027)
    try:
        files.check(file)
        assert names(file.parent) == []
        files.write(file, b"one")
    finally:
        os.umask(before)
    assert file.read_bytes() == b"one" and stat.S_IMODE(file.stat().st_mode) == 0o640


def test_an_existing_file_keeps_its_mode_and_is_another_version(tmp_path):
    file = tmp_path / "f"
    file.write_bytes(b"old")
    file.chmod(0o604)
    was = files.stamp_of(file)
    files.check(file)
    assert files.stamp_of(file) == was, "a check leaves the file alone"
    assert files.write(file, b"new") == files.stamp_of(file) != was
    assert stat.S_IMODE(file.stat().st_mode) == 0o604 and names(tmp_path) == ["f"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_root_leaves_a_file_to_its_owner(tmp_path):
    file = tmp_path / "f"
    file.touch()
    os.chown(file, SOMEBODY_ELSE, SOMEBODY_ELSE)
    files.write(file, b"new")
    assert (file.stat().st_uid, file.stat().st_gid) == (SOMEBODY_ELSE, SOMEBODY_ELSE)


@pytest.mark.parametrize("target_exists", [True, False])
def test_a_link_stays_and_its_target_is_written(target_exists, tmp_path):
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    target.parent.mkdir()
    if target_exists:
        target.write_bytes(b"old")
    link.symlink_to(os.path.join("folder", "target"))
    files.check(link)
    files.write(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new" and names(target.parent) == ["target"]


def test_the_longest_name_is_still_one(tmp_path):
    file = tmp_path / ("n" * 255)
    files.check(file)
    files.write(file, b"new")
    assert file.read_bytes() == b"new"


# Below a folder with a file, a link to itself, and nothing else.
REFUSED = {
    "Is a directory": "",
    "Not a directory": "file/f",
    "embedded null byte": "a\0b",
    "Too many levels of symbolic links": "loop",
    "File name too long": "n" * 256,
    "No space left on device": "/dev/full",
    "No such file or directory": "/proc/nothing/f",
    "surrogates not allowed": "\ud800",
}


@pytest.mark.parametrize("reason", list(REFUSED))
@pytest.mark.parametrize("write", [files.check, lambda path: files.write(path, b"new")], ids=["check", "write"])
def test_what_cannot_be_written_is_named_with_the_reason(reason, write, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    path = os.path.join(tmp_path, REFUSED[reason])
    before = names(tmp_path)
    with pytest.raises(files.UnwritableError) as error:
        write(path)
    assert reason in str(error.value) and str(error.value).startswith(f"cannot write {files.shown(path)}: ")
    assert names(tmp_path) == before


@pytest.mark.parametrize("write", [files.check, lambda path: files.write(path, b"new")], ids=["check", "write"])
def test_permissions_are_kept_to(write):
    with no_root() as folder:
        file = folder / "f"
        file.write_bytes(b"old")
        file.chmod(0o400)
        with pytest.raises(files.UnwritableError, match="Permission denied"):
            write(file)
        folder.chmod(0o500)
        for path in (file, folder / "new", folder / "deeper" / "new"):
            with pytest.raises(files.UnwritableError, match="Permission denied"):
                write(path)
        assert file.read_bytes() == b"old" and names(folder) == ["f"]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("moment", ["replace", "chmod"])
def test_a_failure_leaves_the_older_file_and_nothing_else(failure, moment, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise failure

    file = tmp_path / "f"
    file.write_bytes(b"old")
    monkeypatch.setattr(f"fusedonemoe.files.os.{moment}", fail)
    with pytest.raises(files.UnwritableError if isinstance(failure, OSError) else KeyboardInterrupt):
        files.write(file, b"new")
    assert file.read_bytes() == b"old" and names(tmp_path) == ["f"]


def test_a_full_disk_leaves_the_older_file_and_nothing_else(tmp_path):
    file = tmp_path / "f"
    file.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(files.UnwritableError, match="File too large"):
            files.write(file, bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == b"old" and names(tmp_path) == ["f"]


def test_many_writers_neither_fail_nor_mix(tmp_path):
    file, problems, done = tmp_path / "f", [], threading.Event()
    contents = [bytes([65 + n]) * (20_000 + n) for n in range(6)]

    def attempt(act):
        def run():
            try:
                act()
            except BaseException as error:
                problems.append(error)

        return threading.Thread(target=run)

    def read():
        while not done.is_set():
            with suppress(FileNotFoundError):
                assert file.read_bytes() in contents

    writers = [attempt(lambda content=content: [files.write(file, content) for _ in range(40)]) for content in contents]
    reader = attempt(read)
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert not problems and file.read_bytes() in contents and names(tmp_path) == ["f"]


def test_a_pipe_is_written_to_and_a_check_does_not_end_it(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    files.check(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    files.check(pipe)
    files.write(pipe, b"new")
    reader.join()
    assert got == [b"new"] and files.is_stream(pipe) and stat.S_ISFIFO(pipe.stat().st_mode)


def test_devices_stay_devices():
    files.check("/dev/null")
    assert files.write("/dev/null", b"new") is None
    assert files.is_stream("/dev/null") and stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_the_own_output_goes_on_where_it_is(capfd):
    # capfd keeps it in a file, as a shell does with > file.
    assert files.is_stream("/dev/stdout")
    files.check("/dev/stdout")
    os.write(1, b"before\n")
    files.write("/dev/stdout", b"page\n")
    os.write(1, b"after\n")
    assert capfd.readouterr().out == "before\npage\nafter\n"


def test_a_reader_that_went_away_is_no_fault_of_the_path():
    read, write = os.pipe()
    os.close(read)
    try:
        with pytest.raises(BrokenPipeError):
            files.write(f"/dev/fd/{write}", b"new")
    finally:
        os.close(write)
