"""A file of this package run as a script in a new process: question and answer are files, nothing else is shared."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunelit.runtime.errors import NotProved


def run_proof_script(script: str, question: Mapping[str, Any], folder: Path, failure: str, telling: str = "") -> bytes:
    """Run `python -P script ASKED ANSWER`.

    Nothing is looked up on a hub, and copies of remote code go with the process.

    Args:
        script: path of the file; with -P, its folder is not searched for modules.
        question: what ASKED holds, as JSON.
        folder: where both files lie; it is the one that is proved, and so they go with it if this process is killed.
        failure: what it means if the script fails, for the message.
        telling: what stands in the line that says why; "": that is the last line.

    Returns:
        What it wrote to ANSWER.

    Raises:
        NotProved: it failed; with what it said.
    """
    with tempfile.TemporaryDirectory(prefix=".proof-", dir=folder) as inside:
        asked, answer = Path(inside, "asked.json"), Path(inside, "answer")
        asked.write_text(json.dumps(question), encoding="utf-8")
        environment = os.environ | {"HF_MODULES_CACHE": str(Path(inside, "modules")), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-P", script, str(asked), str(answer)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode or not answer.is_file():
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            said = next((line for line in lines if telling and telling in line), None)
            if said is None and done.returncode < 0:
                said = f"its process was ended by signal {-done.returncode} (out of memory?)"
            said = said or (lines or ["it said nothing"])[-1]
            raise NotProved(f"{failure}: {said[-300:]}; nothing was kept")
        return answer.read_bytes()
