"""Measure in a new process, so that nothing of one method affects the next."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

GAPLESS = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def in_own_process(script: str, *arguments: Any, gapless: bool = True) -> Any:
    """Run a script and return the JSON of its last output line.

    Args:
        script: Path of the script.
        arguments: Its command-line arguments.
        gapless: Whether glibc returns freed tensors at once. By default it keeps gaps between them.
    """
    command = [sys.executable, script, *map(str, arguments)]
    environment = os.environ | (GAPLESS if gapless else {})
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])
