"""The CPU kernels and their pool of memory across fork(), at the end of threads and of the process, and twice in one process."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from fusedonemoe.ops.cpu import build, native

ROOT = Path(__file__).parents[2]
_REFUSAL = native.refusal(torch.float32, True)
pytestmark = [
    pytest.mark.skipif(_REFUSAL is not None, reason=f"no CPU kernels: {_REFUSAL}"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork()"),
]

# The pool by itself: a process that does not import torch forks in a tenth of the time.
POOL = """
    import ctypes, importlib.util, os, signal, sys, threading, time
    ctypes.CDLL(importlib.util.find_spec("torch").submodule_search_locations[0] + "/lib/libtorch_cpu.so")
    kernels = ctypes.CDLL(sys.argv[1])
    kernels.fusedonemoe_pooled_bytes.restype = ctypes.c_void_p
    kernels.fusedonemoe_pooled_bytes.argtypes = [ctypes.c_int64]
    deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    def take(size=1 << 20):
        return kernels.fusedonemoe_pooled_bytes(size)

    def give(tensor):
        deleter(ctypes.c_void_p.from_address(tensor + 56).value)(tensor)
"""

# Every operator with a CPU kernel, forward and backward, on two threads however small it is.
OPERATORS = """
    import ctypes, faulthandler, multiprocessing, os, threading, torch
    from fusedonemoe.ops.cpu import build
    from fusedonemoe.cli.probes import make_probes

    for name in ("products", "keys"):
        ctypes.c_double.in_dll(build.load(), f"fusedonemoe_{name}_per_thread").value = 1
    torch.set_num_threads(2)
    probes = [
        (probe, "cpu" if "cpu" in impls else "auto")
        for dtype in (torch.float32, torch.bfloat16)
        for probe, impls in make_probes(dtype, "cpu")
        if probe.operator not in ("experts_mlp_lora", "route_product_key")  # torch's operators alone, which hang in a child
    ]

    def run():
        torch.set_num_threads(2)  # the workers of a DataLoader begin with one
        parts = []
        for probe, impl in probes:
            output = probe.forward(impl)
            parts += [output, *torch.autograd.grad(output, list(probe.leaves.values()), probe.seed)]
        # numpy, because torch's own parallel regions wait for workers that a child does not have
        return b"".join(part.detach().contiguous().view(torch.uint8).numpy().tobytes() for part in parts)

    expected = run()

    def check():
        faulthandler.dump_traceback_later(20, exit=True)
        assert run() == expected
        faulthandler.cancel_dump_traceback_later()
"""


def run(setup, script, *arguments, seconds=60, **environment):
    """What the program of two parts prints; it fails, with all that it started, where it takes longer."""
    program = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(setup) + textwrap.dedent(script), *map(str, arguments)],
        env={**os.environ, **environment},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, err = program.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(program.pid, 9)
        raise AssertionError(f"it took more than {seconds} s\n{program.communicate()[1]}") from None
    assert program.returncode == 0, err
    return out.strip()


def test_forks_while_other_threads_use_the_pool():
    # A long list of idle memory, which take() searches, keeps the mutex locked for most of the time.
    script = """
        for tensor in [take(1 << 21) for _ in range(3000)]:
            give(tensor)

        def churn():
            while True:
                give(take())

        for _ in range(3):
            threading.Thread(target=churn, daemon=True).start()
        end, forks = time.monotonic() + 2, 0
        while time.monotonic() < end:
            child = os.fork()
            if child == 0:
                signal.alarm(10)
                give(take())
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0, f"the child of fork {forks} hung"
            forks += 1
        print(forks, flush=True)
        os._exit(0)
    """
    assert int(run(POOL, script, build.load()._name)) > 20


def test_every_kernel_runs_in_forked_children():
    script = """
        def in_child(body):
            child = os.fork()
            if child == 0:
                try:
                    body()
                    os._exit(0)
                except BaseException:
                    import traceback

                    traceback.print_exc()
                os._exit(1)
            return os.waitpid(child, 0)[1]

        def twice():
            check()
            check()

        assert in_child(twice) == 0
        assert in_child(lambda: os._exit(in_child(check))) == 0  # a grandchild

        def on_another_thread():
            thread = threading.Thread(target=check)
            thread.start()
            thread.join()

        assert in_child(on_another_thread) == 0
        statuses = []
        forking = threading.Thread(target=lambda: statuses.append(in_child(check)))
        forking.start()
        forking.join()
        assert statuses == [0]

        process = multiprocessing.get_context("fork").Process(target=check)
        process.start()
        process.join()
        assert process.exitcode == 0

        class Data(torch.utils.data.Dataset):
            def __len__(self):
                return 4

            def __getitem__(self, index):
                check()
                return index

        loader = torch.utils.data.DataLoader(Data(), num_workers=2, multiprocessing_context="fork")
        assert [int(index) for index in loader] == [0, 1, 2, 3]
        assert run() == expected
        print("done")
    """
    assert run(OPERATORS, script, seconds=200) == "done"


def test_tensors_of_the_pool_outlive_threads_and_the_interpreter():
    script = """
        import threading, torch
        from fusedonemoe.ops.cpu import native

        kept = []

        def churn(rounds):
            for _ in range(rounds):
                kept.append(native.new((1 << 19,), torch.float32).fill_(1))
                del kept[: len(kept) - 5]

        threads = [threading.Thread(target=churn, args=(50,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(bool((tensor == 1).all()) for tensor in kept)
        print("done")
    """
    assert run("", script, OMP_NUM_THREADS="1") == "done"


def test_threads_use_the_pool_while_the_process_ends():
    script = """
        def churn():
            while True:
                give(take())

        for _ in range(3):
            threading.Thread(target=churn, daemon=True).start()
        time.sleep(0.1)
        print("done")
    """
    for _ in range(3):
        assert run(POOL, script, build.load()._name) == "done"


def test_two_libraries_in_one_process_have_a_pool_each(tmp_path):
    one = build.load()._name
    other = tmp_path / "other.so"
    other.write_bytes(Path(one).read_bytes())
    script = """
        other = ctypes.CDLL(sys.argv[2])
        for library in (kernels, other):
            library.fusedonemoe_pool_peak.restype = ctypes.c_int64
            library.fusedonemoe_pool_peak()
        tensor = take(5 << 20)
        print(other.fusedonemoe_pool_peak(), kernels.fusedonemoe_pool_peak())
        give(tensor)
    """
    assert run(POOL, script, one, other) == f"0 {6 << 20}"
