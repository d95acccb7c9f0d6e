"""Models from the hub by id, and to it: safetensors and JSON only, through huggingface_hub."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from groundup.core.errors import CheckpointError
from groundup.core.progress import say

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
# What a model folder needs; pickles and code stay where they are.
WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")


def is_hub_id(name: str) -> bool:
    """Return whether a name may be "org/name" or "org/name@revision" rather than a local path.

    Below a folder that exists it is a misspelt path, and the network is left alone.
    """
    return ID.fullmatch(name) is not None and not Path(name.split("/")[0]).exists()


def snapshot(name: str) -> Path:
    """Return the local folder of a hub model; what the cache holds whole is not asked for again.

    Honours HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo, _, revision = name.partition("@")
    fetch = partial(snapshot_download, repo, revision=revision or None, allow_patterns=list(WANTED))
    try:
        return Path(fetch(local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        pass  # not in the cache, or not whole
    except HFValidationError as err:
        raise CheckpointError(f"{name!r} is neither a folder nor a hub id ({err})") from err
    say(f"fetching {name} from the hub")
    try:
        return Path(fetch())
    except LocalEntryNotFoundError as err:
        raise CheckpointError(
            f"{name} is no folder here, is not in the cache, and the hub cannot be reached "
            f"({reason(err)}): check the name and the network"
        ) from err
    except HfHubHTTPError as err:
        raise CheckpointError(
            f"the hub gives no model {name}: {reason(err)}. Check the name; a private or gated "
            "model needs HF_TOKEN"
        ) from err
    except Exception as err:  # what breaks on the way has no common class in the client
        raise CheckpointError(f"fetching {name}: the hub does not answer ({reason(err)})") from err


def push_folder(
    folder: Path, name: str, *, private: bool = False, files: Sequence[str] | None = None
) -> str:
    """Upload a folder, or these files of it, as the hub model "org/name"; return its address.

    The hub model is made where it is not there. Needs HF_TOKEN, or `hf auth login`.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=list(files) if files else None,
            commit_message="Upload model",
        )
    except (HFValidationError, LocalTokenNotFoundError) as err:
        raise CheckpointError(f"cannot push to {name!r}: {reason(err)}") from err
    except HfHubHTTPError as err:
        raise CheckpointError(
            f"the hub refused {name}: {reason(err)}. Set HF_TOKEN to a token that may write there"
        ) from err
    except Exception as err:  # what breaks on the way has no common class in the client
        raise CheckpointError(f"pushing {name}: the hub does not answer ({reason(err)})") from err
    return str(address)


def reason(err: BaseException) -> str:
    """Return an error's first words in one line: those of its cause where it has one."""
    cause = err.__cause__ or err
    return next((line.strip() for line in str(cause).splitlines() if line.strip()), repr(cause))
