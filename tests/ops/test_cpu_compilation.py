"""The compilation of the CPU kernels among many processes and threads: one compiles at a time, and none leaves anything."""

import errno
import os
import signal
import time
from pathlib import Path

import pytest

from tests.ops.test_cpu_build import BUILD, LOAD, cached, compiler, finished, linked, load_in_a_process, needs_kernels, process

__all__ = ["compiler"]
pytestmark = [needs_kernels, pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users")]


def write_compiler(script):
    """Replace the fixture's compiler; ``make_it`` is what that does."""
    Path(os.environ["CXX"]).write_text(
        f'#!/bin/sh\nmake_it() {{ for last; do :; done; cp "$COMPILED" "$last"; }}\necho "$$ $@" >> "$LOG"\n{script}\n'
    )


def attempts(log):
    """How many compilations have begun."""
    return sum("-DCOMMON" in call for call in log.read_text().splitlines())


def wait_until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def compilers(log):
    """The process ids of the compilers, and of what they started and noted in the log."""
    return [int(line.split()[0]) for line in log.read_text().splitlines()]


def reason_of(started):
    """The reason why a process has no kernels."""
    return finished(started)[0]


REASON = (
    BUILD
    + """
    try:
        print(build.load().fusedonemoe_lanes())
    except build.Unavailable as error:
        print(error)
"""
)


def test_of_eight_processes_one_compiles(compiler, tmp_path):
    racers = [load_in_a_process(SECONDS_IT_TAKES="0.5") for _ in range(8)]
    results = [finished(racer) for racer in racers]
    assert len({lanes for lanes, _ in results}) == 1 and attempts(compiler) == len(linked(compiler)) == 1
    said = [err for _, err in results]
    assert sum("compiling the CPU kernels" in err for err in said) == 1
    assert all(err.count("waiting for it, 660 seconds at most") <= 1 for err in said)
    assert [path.suffix for path in cached(tmp_path)] == [".so"]


def test_of_eight_threads_one_compiles(compiler, tmp_path):
    script = """
        import threading
        found = []
        threads = [threading.Thread(target=lambda: found.append(build.load())) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 8 and len({id(library) for library in found}) == 1
    """
    _, err = finished(process([BUILD, script], SECONDS_IT_TAKES="0.3"))
    assert attempts(compiler) == 1 and err.count("\n") == 1


def test_another_takes_over_from_a_killed_process(compiler, tmp_path):
    # The killed process has a child, which must not keep its lock; and compilers that have children, which must end.
    write_compiler('if mkdir "$LOG.first" 2>/dev/null; then :; fi; if [ -e "$LOG.killed" ]; then make_it "$@"; exit; fi; '
                   'sleep 100 & echo "$! child" >> "$LOG"; wait')  # fmt: skip
    holder = process([BUILD, """
        import os, threading, time
        threading.Thread(target=build.load, daemon=True).start()
        while not os.path.exists(os.environ["LOG"] + ".first"):
            time.sleep(0.01)
        if os.fork() == 0:
            time.sleep(100)
        time.sleep(100)
    """])  # fmt: skip
    try:
        wait_until(lambda: compiler.read_text().count("child") == 2)
        started = compilers(compiler)
        assert len(started) == 4 and all(map(is_alive, started))
        waiting = load_in_a_process()
        assert "another process compiles the CPU kernels" in waiting.stderr.readline()
        Path(f"{compiler}.killed").write_text("")
        os.kill(holder.pid, signal.SIGKILL)
        lanes, err = finished(waiting)
        assert int(lanes) and err.startswith("fusedonemoe: compiling")
        wait_until(lambda: not any(map(is_alive, started)), 5)
        assert [path.suffix for path in cached(tmp_path)] == [".so"]
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_compilers_too(compiler, tmp_path, number):
    write_compiler('sleep 100 & echo "$! child" >> "$LOG"; wait')
    # A shell starts what runs in its background with SIGINT ignored, and children inherit that.
    started = process(["import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n", LOAD])
    wait_until(lambda: compiler.read_text().count("child") == 2)
    os.kill(started.pid, number)
    started.communicate(timeout=10)
    assert started.returncode != 0
    wait_until(lambda: not any(map(is_alive, compilers(compiler))), 5)
    write_compiler('make_it "$@"')
    finished(load_in_a_process())
    assert [path.suffix for path in cached(tmp_path)] == [".so"]


@pytest.mark.parametrize(
    "script", ["sleep 100", "sleep 100 & wait", "(sleep 100 &) ; sleep 100", "trap '' TERM INT HUP; sleep 100 & wait"]
)
def test_a_time_out_ends_what_the_compiler_started(compiler, tmp_path, script):
    write_compiler(script.replace("sleep 100", "sh -c 'echo $$ >> $LOG; exec sleep 100'"))
    limited = REASON.replace("    try:", "    build.SECONDS_TO_COMPILE = 1\n    try:", 1)
    begun = time.monotonic()
    assert reason_of(process([limited])).endswith("c++ could not be run: it timed out after 1 seconds")
    assert time.monotonic() - begun < 15
    assert not any(map(is_alive, compilers(compiler))) and len(compilers(compiler)) >= 4
    assert not list((tmp_path / "cache").glob("compiling-*"))


def test_a_failure_is_tried_once_more_and_then_shared(compiler, tmp_path):
    write_compiler('while [ ! -e "$LOG.go" ]; do sleep 0.02; done; echo "no luck" >&2; exit 1')
    ranks = [process([REASON]) for _ in range(8)]
    first = [rank.stderr.readline() for rank in ranks]
    assert sum("compiling the CPU kernels" in line for line in first) == 1
    assert sum("another process compiles" in line for line in first) == 7
    Path(f"{compiler}.go").write_text("")
    reasons = {reason_of(rank) for rank in ranks}
    assert len(reasons) == 1 and reasons.pop().endswith("c++ failed: no luck")
    assert attempts(compiler) == 2
    # A process that comes later tries again: what was wrong may have been mended.
    write_compiler('make_it "$@"')
    assert int(reason_of(process([REASON]))) and [path.suffix for path in cached(tmp_path)] == [".so"]


def test_a_failure_of_one_process_is_made_good_by_the_next(compiler, tmp_path):
    write_compiler(
        'while [ ! -e "$LOG.go" ]; do sleep 0.02; done; if mkdir "$LOG.first" 2>/dev/null; then exit 1; fi; make_it "$@"'
    )
    ranks = [process([REASON]) for _ in range(4)]
    for rank in ranks:
        rank.stderr.readline()
    Path(f"{compiler}.go").write_text("")
    reasons = [reason_of(rank) for rank in ranks]
    assert sum(reason.isdigit() for reason in reasons) == 3 and sum("failed: no message" in reason for reason in reasons) == 1
    assert attempts(compiler) == 2 and [path.suffix for path in cached(tmp_path)] == [".so"]


def test_waiting_has_an_end(compiler, tmp_path):
    write_compiler('while [ ! -e "$LOG.go" ]; do sleep 0.02; done; make_it "$@"')
    holder = load_in_a_process()
    assert "compiling" in holder.stderr.readline()
    hurried = REASON.replace("    try:", "    build.SECONDS_TO_WAIT = 0.3\n    try:", 1)
    reason = f"another process has been compiling the kernels into {tmp_path / 'cache'} for 0.3 seconds"
    out, err = finished(process([hurried]))
    assert out == reason and f"going on without the CPU kernels: {reason}" in err
    Path(f"{compiler}.go").write_text("")
    finished(holder)


NO_FLOCK = """
    import fcntl
    def flock(descriptor, operation):
        raise OSError({}, "No locks available")
    fcntl.flock = flock
"""
OLD_FILELOCK = """
    import filelock
    filelock.__version__ = "3.12.2"
    del filelock.FileLock
"""


@pytest.mark.parametrize("without", [NO_FLOCK.format(errno.ENOLCK), NO_FLOCK.format(errno.ENOSYS), OLD_FILELOCK])
def test_without_locks_it_compiles_as_well(compiler, tmp_path, without):
    assert int(finished(process([BUILD, without, LOAD.removeprefix(BUILD)]))[0])
    assert len(linked(compiler)) == 1


def test_a_child_that_was_forked_during_the_compilation(compiler, tmp_path):
    script = """
        import os, threading, time
        compiling = threading.Thread(target=build.load)
        compiling.start()
        children = []
        while compiling.is_alive():
            child = os.fork()
            if child == 0:
                if len(children) % 2:
                    sys.exit(0)  # what runs at exit must leave the parent's files alone
                os._exit(0 if build.load().fusedonemoe_lanes() else 1)
            children.append(child)
            time.sleep(0.05)
        compiling.join()
        assert len(children) > 5 and not any(os.waitpid(child, 0)[1] for child in children)
        print(build.load().fusedonemoe_lanes())
    """
    finished(process([BUILD, script], SECONDS_IT_TAKES="0.5"))
    assert attempts(compiler) == len(linked(compiler)) == 1 and [path.suffix for path in cached(tmp_path)] == [".so"]


def test_a_stderr_that_calls_the_library_does_not_wait_for_itself(compiler):
    script = """
        class Stream:
            def write(self, text):
                try:
                    build.load()
                except build.Unavailable as error:
                    print(error)
            def flush(self):
                pass
        sys.stderr = Stream()
        print(build.load().fusedonemoe_lanes())
    """
    said, lanes = finished(process([BUILD, script]))[0].splitlines()
    assert said == "the kernels are being loaded by this very thread" and int(lanes)


@pytest.mark.parametrize(
    "stderr",
    [
        "None",
        "open('/dev/full', 'w')",
        "open('/dev/null', 'w'); sys.stderr.close()",
        "os.fdopen(broken, 'w')",
        "Raises()",
    ],
)
@pytest.mark.parametrize("outcome", ["kernels", "none"])
def test_no_stderr_is_no_obstacle(compiler, tmp_path, stderr, outcome):
    if outcome == "none":
        write_compiler("echo no luck >&2; exit 1")
    script = f"""
        import os
        class Raises:
            def __getattr__(self, name):
                raise RuntimeError("no stream")
        reading, broken = os.pipe()
        os.close(reading)
        sys.stderr = {stderr}
    """
    # The process ends with 120 where its stderr has something left to write. Of a stream that always raises it says so itself.
    restore = "sys.stderr = sys.__stderr__" if stderr == "Raises()" else ""
    out, err = finished(process([BUILD, script, REASON.removeprefix(BUILD), restore]))
    assert (out.isdigit() if outcome == "kernels" else out.endswith("failed: no luck")) and "\n" not in out and err == ""


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("outcome", ["kernels", "none"])
def test_closed_standard_streams_are_no_obstacle(compiler, tmp_path, closed, outcome):
    """A descriptor of ours that took such a number would be gone in the compiler, or would get what is written to stderr."""
    if outcome == "none":
        write_compiler("echo no luck >&2; exit 1")
    script = f"""
        import os
        for number in {closed}:
            os.close(number)
        def print(text):
            with open({str(tmp_path / "result")!r}, "w") as file:
                file.write(str(text))
    """
    process([script, REASON]).wait(60)
    result = (tmp_path / "result").read_text()
    assert result.isdigit() if outcome == "kernels" else result.endswith("failed: no luck")
    assert cached(tmp_path)[0].suffix == (".so" if outcome == "kernels" else ".failed")


@pytest.mark.parametrize("outcome", ["kernels", "none"])
def test_a_process_that_ignores_its_children_learns_how_they_ended(compiler, outcome):
    if outcome == "none":
        write_compiler("echo no luck >&2; exit 1")
    out, _ = finished(process(["import signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\n", REASON]))
    assert out.isdigit() if outcome == "kernels" else out.endswith("failed: no luck")


def test_what_a_killed_process_has_left_is_removed_by_one_that_needs_no_compiler(compiler, tmp_path):
    write_compiler('case "$*" in *-DOTHER*) sleep 60;; esac; make_it "$@"')
    finished(load_in_a_process())
    (library,) = cached(tmp_path)
    holder = load_in_a_process(FUSEDONEMOE_CXXFLAGS="-DOTHER")
    assert "compiling" in holder.stderr.readline()
    wait_until(lambda: len(cached(tmp_path)) == 2)
    finished(load_in_a_process())  # while the other is at work
    assert {path.name.partition("-")[0] for path in cached(tmp_path)} == {"compiling", "kernels"}
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    finished(load_in_a_process())
    assert cached(tmp_path) == [library]
