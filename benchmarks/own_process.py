"""Measure in a process of its own: what one method left behind does not count for the next."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

GAPLESS = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def in_own_process(script: str, *arguments: Any, gapless: bool = True) -> Any:
    """What `script` prints in its last line, read as JSON.

    Args:
        script: Path of a file.
        arguments: Its command line.
        gapless: Have glibc give freed tensors back at once; by default it keeps gaps between them.
    """
    command = [sys.executable, script, *map(str, arguments)]
    environment = os.environ | (GAPLESS if gapless else {})
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])
