"""Call each function in a new process, forked from one with all imports done, which saves seconds per call."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch


class Forks:
    """Processes forked from one that has imported `module` and done nothing else.

    Args:
        module: Name of a module in `benchmarks/`. Its imports must not initialize CUDA: a fork could not use it then.
    """

    def __init__(self, module: str) -> None:
        # torch then asks NVML whether there is a card, without initializing CUDA
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        folders = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(folders)  # where the first process looks for `module`
        self._context: Any = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([module])
        if self.call(_cannot_use_cuda, timeout=120):
            print(f"importing {module} initializes CUDA: each process imports it again (seconds)", flush=True)
            self._context = multiprocessing.get_context("spawn")

    def call(self, function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
        """Call a function in a new process and return its result.

        Args:
            function: Function at the top level of a module.
            arguments: Arguments of the function.
            timeout: Seconds after which the process is killed.

        Raises:
            TimeoutError: If it took longer.
            EOFError: If the process ended without a result; the text has the exit code.
        """
        receive, send = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_answer, args=(send, function, arguments))
        process.start()
        send.close()
        try:
            if not receive.poll(timeout):
                raise TimeoutError(f"{function.__name__} took more than {timeout:.0f} s")
            return receive.recv()
        except EOFError:
            process.join()
            raise EOFError(f"the process ended with exit code {process.exitcode}") from None
        finally:
            process.kill()
            process.join()


def _cannot_use_cuda() -> bool:
    return torch.cuda._is_in_bad_fork()


def _answer(send: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    send.send(function(*arguments))
