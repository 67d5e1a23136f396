"""Upload of a finished model to the Hugging Face hub: private unless asked otherwise, with its card, without reports.

report.json, record.json and report.html stay here: they name folders and texts of this machine. Of paths in
the plan the last names go along. The token is that of `hf auth login` or HF_TOKEN, and is never printed.

The upload is tested with a stand-in for the hub's client; it has not run against the hub itself.
"""

from pathlib import Path
from typing import cast

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from prunelit.core.plan import PruningPlan
from prunelit.runtime.errors import BadOption, OutputNotWritable, get_first_line

_PRIVATE_FILES = ("report.json", "record.json", "report.html", "plan.json", ".*")
"""What is not uploaded as it is."""
_HUB_ERRORS = (cast("type[Exception]", HfHubHTTPError.__base__), OSError)
"""What the client raises: errors of its HTTP library, of which its own are a kind, where no answer comes too."""


def check_upload(repository: str) -> None:
    """Check, before any work, that the hub knows who uploads.

    Args:
        repository: OWNER/NAME.

    Raises:
        BadOption: not OWNER/NAME, no token, or the hub is switched off, not reachable, or refuses the token.

    Example: see `tests/export/test_hub_upload.py`.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise BadOption(f"push_to_hub {repository!r}: expected OWNER/NAME, got another form") from error
    if repository.count("/") != 1:
        raise BadOption(f"push_to_hub {repository!r}: expected OWNER/NAME, got no owner")
    if constants.HF_HUB_OFFLINE:
        raise BadOption(f"push_to_hub {repository!r}: expected a hub, got HF_HUB_OFFLINE; unset it")
    if huggingface_hub.get_token() is None:
        raise BadOption(f"push_to_hub {repository!r}: expected a token, got none; run hf auth login, or set HF_TOKEN")
    try:
        huggingface_hub.HfApi().whoami()
    except _HUB_ERRORS as error:
        raise BadOption(f"push_to_hub {repository!r}: the hub refuses: {_describe_refusal(error)}") from error


def upload_model(path: Path, repository: str, public: bool = False) -> str:
    """Upload a finished model.

    Args:
        path: folder that prunelit wrote, or a file of a format that is one.
        repository: OWNER/NAME; made if it does not exist.
        public: make the repository public; one that exists must be so already.

    Returns:
        The address.

    Raises:
        BadOption: the repository exists and is public, and public was not asked for.
        OutputNotWritable: the hub refuses; the model stays on this machine.

    Example: see `check_upload`.
    """
    client = huggingface_hub.HfApi()
    try:
        address = str(client.create_repo(repository, private=not public, exist_ok=True))
        if not public and not client.repo_info(repository).private:
            raise BadOption(
                f"push_to_hub {repository!r}: expected a private repository, got a public one; pass --public, or "
                f"another name; the model is in {path}"
            )
        message = "Model pruned by prunelit"
        if path.is_file():
            client.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=repository, commit_message=message)
            return address
        client.upload_folder(
            repo_id=repository, folder_path=path, commit_message=message, ignore_patterns=list(_PRIVATE_FILES)
        )
        if (path / "plan.json").is_file():
            content = PruningPlan.load(path / "plan.json").without_paths().to_json().encode()
            client.upload_file(
                path_or_fileobj=content, path_in_repo="plan.json", repo_id=repository, commit_message="Its plan"
            )
    except _HUB_ERRORS as error:
        raise OutputNotWritable(
            f"push_to_hub {repository!r}: the hub refuses: {_describe_refusal(error)}; the model is in {path}"
        ) from error
    return address


def _describe_refusal(error: Exception) -> str:
    """The first line of what the client says, without the token."""
    token = huggingface_hub.get_token()
    line = get_first_line(error)
    return line.replace(token, "***") if token else line
