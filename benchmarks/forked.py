"""Call functions in processes of their own that have their imports done: a fork takes no seconds, an import does."""

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
        module: Of the benchmarks. What it imports must not touch a CUDA device: a fork could not use it any more.
    """

    def __init__(self, module: str) -> None:
        # torch then asks NVML whether there is a card, which leaves CUDA alone
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        folders = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(folders)  # where the first process looks for `module`
        self._context: Any = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([module])
        if self.call(_cannot_use_cuda, timeout=120):
            print(f"importing {module} touches CUDA: processes do their own imports, which takes seconds", flush=True)
            self._context = multiprocessing.get_context("spawn")

    def call(self, function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
        """What the function returns.

        Args:
            function: Of a module's top level.
            arguments: Its own.
            timeout: Seconds, after which the process is ended.

        Raises:
            TimeoutError: If it took longer.
            EOFError: If the process ended without an answer; the text says how.
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
