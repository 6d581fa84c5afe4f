"""The cache of compiled kernels: only what the user alone can write is loaded, and what does not fit is made again."""

import contextlib
import os
import shutil
import stat
from pathlib import Path

import pytest

from fusedonemoe.ops.cpu import build, cache
from tests.ops.test_cpu_build import LOAD, compiler, finished, load_in_a_process, needs_kernels, process
from tests.ops.test_cpu_compilation import REASON, attempts, reason_of, write_compiler

__all__ = ["compiler"]
pytestmark = [needs_kernels, pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users")]
SYMBOL = b"fusedonemoe_trim"  # that the library itself does not use


# Whose the cache is


@pytest.fixture
def planted(compiler, tmp_path):
    """A cache that holds a whole library under the right name, of this user and safe."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    library = folder / build._plan()[2]
    plant(library, Path(os.environ["COMPILED"]).read_bytes())
    return library


def plant(path, content):
    path.touch(mode=0o600)
    path.write_bytes(content + cache.checksum(content))


def load_again():
    return build._load.__wrapped__()


def as_root():
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")


def folder_all_may_write(library, monkeypatch):
    library.parent.chmod(0o777)
    return library.parent, "can be written by other users (its mode is 0777)"


def folder_a_group_may_write(library, monkeypatch):
    library.parent.chmod(0o770)
    return library.parent, "can be written by other users (its mode is 0770)"


def sticky_folder(library, monkeypatch):
    library.parent.chmod(0o1777)
    return library.parent, "can be written by other users (its mode is 1777)"


def library_all_may_write(library, monkeypatch):
    library.chmod(0o666)
    return library, "can be written by other users (its mode is 0666)"


def library_a_group_may_write(library, monkeypatch):
    library.chmod(0o760)
    return library, "can be written by other users (its mode is 0760)"


def folder_of_another(library, monkeypatch):
    as_root()
    os.chown(library.parent, 12345, -1)
    return library.parent, "belongs to user 12345, and this process is user 0's"


def library_of_another(library, monkeypatch):
    as_root()
    os.chown(library, 12345, -1)
    return library, "belongs to user 12345, and this process is user 0's"


def all_of_another(library, monkeypatch):
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    return library.parent, f"belongs to user {me}, and this process is user {me + 1}'s"


def home_of_another(library, monkeypatch):
    as_root()
    shutil.rmtree(library.parent)
    os.chown(library.parent.parent, 12345, -1)
    return library.parent.parent, "belongs to user 12345, and this process is user 0's"


def link_to_a_folder(library, monkeypatch):
    real = library.parent.rename(library.parent.parent / "real")
    library.parent.symlink_to(real)
    return library.parent, "is a symbolic link"


def link_to_nothing(library, monkeypatch):
    link_to_a_folder(library, monkeypatch)
    shutil.rmtree(library.parent.parent / "real")
    return library.parent, "is a symbolic link"


def link_to_a_library(library, monkeypatch):
    real = library.rename(library.parent.parent / "real")
    library.symlink_to(real)
    return library, "is a symbolic link"


def fifo(library, monkeypatch):
    library.unlink()
    os.mkfifo(library)
    return library, "is not a file"


def folder_for_a_library(library, monkeypatch):
    library.unlink()
    library.mkdir(mode=0o700)
    return library, "is not a file"


def parent_all_may_write(library, monkeypatch):
    library.parent.parent.chmod(0o777)
    return library.parent.parent, "can be written by other users (its mode is 0777)"


def parent_of_a_link_all_may_write(library, monkeypatch):
    above = library.parent.parent
    (above / "open").mkdir()
    (above / "open" / "link").symlink_to(above)
    (above / "open").chmod(0o777)
    monkeypatch.setenv("FUSEDONEMOE_CACHE_DIR", str(above / "open" / "link" / library.parent.name))
    return above / "open", "can be written by other users (its mode is 0777)"


REFUSED = [
    *(folder_all_may_write, folder_a_group_may_write, sticky_folder, library_all_may_write, library_a_group_may_write),
    *(folder_of_another, library_of_another, all_of_another, home_of_another, link_to_a_folder, link_to_nothing),
    *(link_to_a_library, fifo, folder_for_a_library, parent_all_may_write, parent_of_a_link_all_may_write),
]


@pytest.mark.parametrize("danger", REFUSED)
def test_what_another_user_could_write_is_refused_by_name(planted, compiler, capfd, monkeypatch, danger):
    path, fault = danger(planted, monkeypatch)
    before = path.lstat()
    why = load_again()
    assert isinstance(why, str) and f"{path} {fault}" in why, why
    assert build.cache_fault() == why
    assert "set FUSEDONEMOE_CACHE_DIR to a folder that is yours and that no other user can write" in why
    assert capfd.readouterr().err == f"fusedonemoe: going on without the CPU kernels: {why}\n"
    assert attempts(compiler) == 0  # neither loaded nor made again
    after = path.lstat()
    assert (before.st_mode, before.st_uid) == (after.st_mode, after.st_uid)


def sticky_parent(library, monkeypatch):
    library.parent.parent.chmod(0o1777)


def parent_a_group_may_write(library, monkeypatch):
    library.parent.parent.chmod(0o775)  # a umask of 002 makes ~/.cache so


def readable_by_all(library, monkeypatch):
    library.parent.chmod(0o755)
    library.chmod(0o644)


def link_above(library, monkeypatch):
    above = library.parent.parent
    (above / "link").symlink_to(above)
    monkeypatch.setenv("FUSEDONEMOE_CACHE_DIR", str(above / "link" / library.parent.name))


def relative(library, monkeypatch):
    monkeypatch.chdir(library.parent.parent)
    monkeypatch.setenv("FUSEDONEMOE_CACHE_DIR", library.parent.name)


@pytest.mark.parametrize("layout", [sticky_parent, parent_a_group_may_write, readable_by_all, link_above, relative])
def test_what_only_the_user_can_write_is_loaded(planted, compiler, monkeypatch, layout):
    layout(planted, monkeypatch)
    assert load_again()._name.endswith(planted.name) and attempts(compiler) == 0 and build.cache_fault() is None


@pytest.mark.parametrize("danger", [parent_a_group_may_write, sticky_parent])
def test_without_proc_a_group_may_not_write_above(planted, monkeypatch, danger):
    monkeypatch.setattr(cache, "IS_BY_DESCRIPTOR", False)
    danger(planted, monkeypatch)
    library = load_again()
    if danger is sticky_parent:
        assert library._name == str(planted)
    else:
        assert f"{planted.parent.parent} can be written by other users (its mode is 0775)" in library


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_what_is_made_is_the_users_alone(compiler, tmp_path, umask):
    folder = tmp_path / "new" / "cache"
    script = f"import os; os.umask({umask})\n"
    finished(process([script, LOAD], FUSEDONEMOE_CACHE_DIR=str(folder)))
    library, lock = sorted(folder.iterdir())
    for path, mode in ((folder.parent, 0o700), (folder, 0o700), (library, 0o700), (lock, 0o600)):
        assert stat.S_IMODE(path.stat().st_mode) == mode
    finished(process([script, LOAD], FUSEDONEMOE_CACHE_DIR=str(folder)))
    assert attempts(compiler) == 1


@pytest.mark.skipif(not cache.IS_BY_DESCRIPTOR, reason="open folders have no names here")
def test_a_folder_that_is_exchanged_puts_no_library_in_place(planted, monkeypatch):
    with contextlib.closing(cache.Folder(planted.parent)) as folder:
        found = folder.look(planted.name)
        moved = planted.parent.rename(planted.parent.parent / "moved")
        planted.parent.mkdir(mode=0o777)
        plant(planted, b"planted")
        assert folder.look(planted.name) == found
        library = build._open(folder, planted.name, found)
    assert not isinstance(library, str)
    mapped = Path("/proc/self/maps").read_text()
    assert str(moved / planted.name) in mapped and f" {planted}\n" not in mapped


# A library that is whole and does not fit


def test_a_library_without_a_symbol_is_made_again(planted, compiler):
    content = planted.read_bytes()
    assert SYMBOL in content
    plant(planted, content[: -cache.CHECKSUM_BYTES].replace(SYMBOL, SYMBOL[::-1]))
    assert hasattr(load_again(), SYMBOL.decode()) and attempts(compiler) == 1
    assert planted.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF" + bytes(100)])
def test_a_library_that_does_not_load_is_made_again(planted, compiler, content):
    whole = planted.read_bytes()
    plant(planted, content)
    assert not isinstance(load_again(), str) and attempts(compiler) == 1 and planted.read_bytes() == whole


def test_of_eight_processes_one_makes_it_again(planted, compiler):
    plant(planted, planted.read_bytes()[: -cache.CHECKSUM_BYTES].replace(SYMBOL, SYMBOL[::-1]))
    for started in [load_in_a_process(SECONDS_IT_TAKES="0.3") for _ in range(8)]:
        finished(started)
    assert attempts(compiler) == 1


@pytest.mark.parametrize("content", ["without a symbol", "not a library"])
def test_what_does_not_fit_when_it_is_new_is_made_once(planted, compiler, tmp_path, monkeypatch, content):
    bad = tmp_path / "bad.so"
    bad.write_bytes(planted.read_bytes().replace(SYMBOL, SYMBOL[::-1]) if content == "without a symbol" else b"not a library")
    planted.unlink()
    monkeypatch.setenv("COMPILED", str(bad))
    reasons = {reason_of(process([REASON])) for _ in range(3)}
    text = (
        f"{planted} has no {SYMBOL.decode()}" if content == "without a symbol" else "the kernels could not be cached or loaded: "
    )
    assert all(text in reason for reason in reasons) and attempts(compiler) == 1


# What else is in the folder


@pytest.mark.parametrize(
    "make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/zero", path)], ids=["folder", "fifo", "link"]
)
@pytest.mark.parametrize("outcome", ["kernels", "none"])
def test_what_has_the_name_of_a_note_of_failures_is_no_obstacle(planted, compiler, make, outcome):
    make(f"{planted}.failed")
    make(planted.parent / "kernels-x.so.failed")
    (planted.parent / "notes.failed").touch()
    planted.unlink()
    if outcome == "none":
        write_compiler("echo no luck >&2; exit 1")
    result = load_again()
    assert not isinstance(result, str) if outcome == "kernels" else result.endswith("failed: no luck")
    assert (planted.parent / "notes.failed").exists()


def test_the_next_compilation_removes_what_older_versions_left(planted, compiler):
    folders = [planted.parent / f"tmp{name}" for name in ("abcdefg_", "abcdefg1", "abcdefg2", "abcdefg3", "other")]
    for folder in folders:
        folder.mkdir()
        (folder / "f32.o").touch()
        os.utime(folder, (0, 0))
    old, new, empty, others, _ = folders
    os.utime(new)
    (empty / "f32.o").unlink()
    (others / "data").touch()
    for folder in (empty, others):
        os.utime(folder, (0, 0))
    planted.unlink()
    assert not isinstance(load_again(), str)
    assert not old.exists() and all(folder.exists() for folder in folders[1:])


def test_a_system_without_users_goes_on_without_kernels(compiler):
    script = """
        import os, sys, tempfile, torch
        del os.geteuid, os.register_at_fork
        sys.modules["fcntl"] = None
    """
    reason = "the CPU kernels need a system with users and locks, such as Linux or macOS"
    assert finished(process([script, REASON])) == (reason, "")
