"""Programs in processes that need not import torch, diffusers and transformers, which takes eight seconds.

multiprocessing's fork server imports `core.pipeline` once, and each program runs in a fork of it, with its
own arguments, environment, folder and streams. Only what libraries read from the environment as they are
imported is the server's: a program that must have that of its own (HF_…) needs a process of its own.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest.mock import patch


class WarmProcess:
    """A Python file as a program, in a session of its own; so much of `subprocess.Popen` as tests need."""

    def __init__(
        self, argv: list[str], *, cwd: Path, env: dict[str, str], stdout: Path, stderr: Path | None = None
    ) -> None:
        """Its streams are appended to the files, both to `stdout` when there is no `stderr`."""
        context = _server(env)
        self._process = context.Process(target=_run, args=(argv, cwd, env, stdout, stderr))
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float) -> int:
        """The exit status, as of `subprocess.Popen`."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self._process.exitcode


def _server(env: dict[str, str]) -> ForkServerContext:
    """Running; the first call's environment is the one in which it imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["core.pipeline"])
    with patch.dict(os.environ, env, clear=True):
        forkserver.ensure_running()
    return context


def _run(argv: list[str], cwd: Path, env: dict[str, str], stdout: Path, stderr: Path | None) -> None:
    gc.freeze()  # every job collects garbage, and need not go through the imports for it
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, path in (1, stdout), (2, stderr or stdout):
        with path.open("ab") as file:
            os.dup2(file.fileno(), number)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")
