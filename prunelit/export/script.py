"""A file of this package run as a script in a new process: question and answer are files, nothing else is shared."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunelit.errors import NotProved


def ask(script: str, question: Mapping[str, Any], failure: str) -> bytes:
    """Run `python -P script ASKED ANSWER`.

    Nothing is looked up on a hub, and copies of remote code go with the process.

    Args:
        script: path of the file; with -P, its folder is not searched for modules.
        question: what ASKED holds, as JSON.
        failure: what it means if the script fails, for the message.

    Returns:
        What it wrote to ANSWER.

    Raises:
        NotProved: it failed; with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="prunelit-proof-") as beside:
        asked, answer = Path(beside, "asked.json"), Path(beside, "answer")
        asked.write_text(json.dumps(question), encoding="utf-8")
        environment = os.environ | {"HF_MODULES_CACHE": str(Path(beside, "modules")), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-P", script, str(asked), str(answer)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode or not answer.is_file():
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            said = next((line for line in lines if "error" in line.lower()), (lines or ["nothing"])[-1])
            raise NotProved(f"{failure} (exit code {done.returncode}): {said[-300:]}; nothing was kept")
        return answer.read_bytes()
