"""Run a file of this package as a script in a new process; question and answer are files, nothing else is shared."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunelit.runtime.errors import NotProved


def run_proof_script(
    script: str, question: Mapping[str, Any], folder: Path, failure: str, telling: str = "", python: str = ""
) -> bytes:
    """Run `python -P script QUESTION ANSWER`.

    The process looks nothing up on a hub. Copies that transformers makes of remote code are removed with it.

    Args:
        script: path of the file. With -P its folder is not searched for modules.
        question: the content of the file QUESTION, as JSON.
        folder: the folder that is proved. Both files lie in it, so they are removed with it if this process is killed.
        failure: the beginning of the error message if the script fails.
        telling: a text that marks the line of stderr with the reason; "": the reason is the last line.
        python: a Python of another environment; "": the running one.

    Returns:
        The content of the file ANSWER.

    Raises:
        NotProved: the script failed; the message holds the reason.

    Example: see `prunelit.export.proof.compare.run_reload_script`.
    """
    with tempfile.TemporaryDirectory(prefix=".proof-", dir=folder) as scratch:
        question_file, answer_file = Path(scratch, "asked.json"), Path(scratch, "answer")
        question_file.write_text(json.dumps(question), encoding="utf-8")
        environment = os.environ | {"HF_MODULES_CACHE": str(Path(scratch, "modules")), "HF_HUB_OFFLINE": "1"}
        if python:  # this environment's packages are not for the other one
            environment.pop("PYTHONPATH", None)
        command = [python or sys.executable, "-P", script, str(question_file), str(answer_file)]
        process = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", check=False
        )
        if process.returncode or not answer_file.is_file():
            lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
            reason = next((line for line in lines if telling and telling in line), None)
            if reason is None and process.returncode < 0:  # subprocess reports a signal as a negative code
                reason = f"its process was ended by signal {-process.returncode} (out of memory?)"
            reason = reason or (lines or ["it printed no error"])[-1]
            raise NotProved(f"{failure}: {reason[-300:]}; nothing was kept")
        return answer_file.read_bytes()
