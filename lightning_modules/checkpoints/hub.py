"""Checkpoints on the Hugging Face Hub: `hf:ORG/NAME@REV`, or `hf:ORG/NAME/FILE@REV`.

What was fetched lies in the Hub's own cache (`HF_HOME`) and is read from there, also with
`HF_HUB_OFFLINE=1`. A token comes from `hf auth login` or `HF_TOKEN` and is never told.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, scan_cache_dir, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

log = logging.getLogger(__name__)
SCHEME = "hf:"
WEIGHTS = "model.safetensors"  # the names that the Hub's own mixin writes and looks for
CONFIG = "config.json"
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_ADDRESS = re.compile(
    r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[^@]+))?(?:@(?P<revision>[\w./-]+))?"
)


@dataclass(frozen=True)
class HubAddress:
    """A file, or the only weights, of a repository at a revision.

    Attributes:
        repo: `ORG/NAME`.
        file: Path within it; None for its only weights.
        revision: A branch, tag or commit; None for the newest.
    """

    repo: str
    file: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubAddress:
        """Read `hf:ORG/NAME[/FILE][@REV]`.

        Raises:
            ValueError: It is none.
        """
        found = _ADDRESS.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no address on the Hub; write hf:ORG/NAME[/FILE][@REV]")
        return cls(found["repo"], found["file"], found["revision"])

    def __str__(self) -> str:
        file = f"/{self.file}" if self.file else ""
        return f"{SCHEME}{self.repo}{file}" + (f"@{self.revision}" if self.revision else "")


def is_on_hub(path: str | Path) -> bool:
    """True for `hf:...`."""
    return str(path).startswith(SCHEME)


def fetch(text: str | Path) -> Path:
    """Bring a checkpoint here, unless the cache has it.

    Args:
        text: See `HubAddress`.

    Returns:
        The weights' file; what describes the model lies beside it, where the repository has it.

    Raises:
        ValueError: No such address, repository, revision or file; no permission; several weights
            and none named; offline and not in the cache.
    """
    address = HubAddress.parse(str(text))
    with _told(str(address)):
        name = address.file or _only_weights(address, _listing(address))
        wanted = [name, str(Path(name).with_suffix(".json")), CONFIG]
        folder = snapshot_download(address.repo, revision=address.revision, allow_patterns=wanted)
    path = Path(folder) / name
    if not path.is_file():
        raise ValueError(f"{address}: the repository has no file {name!r}")
    return path


def _listing(address: HubAddress) -> list[str]:
    """Names of the repository's files; those in the cache where the Hub cannot be asked."""
    try:
        info = HfApi().model_info(address.repo, revision=address.revision)
        return [file.rfilename for file in info.siblings or ()]
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except (OfflineModeIsEnabled, HTTPError) as error:
        log.warning("%s: the Hub cannot be asked (%s); the cache is used", address, _kind(error))
        return _cached(address)


def _cached(address: HubAddress) -> list[str]:
    """What the cache holds of this revision."""
    wanted = address.revision or "main"
    cache = Path(constants.HF_HUB_CACHE)
    for repository in scan_cache_dir(cache).repos if cache.is_dir() else ():
        for known in repository.revisions if repository.repo_id == address.repo else ():
            if wanted in known.refs or wanted == known.commit_hash:
                root = known.snapshot_path
                return [str(file.file_path.relative_to(root)) for file in known.files]
    raise LocalEntryNotFoundError(f"{address} is not in the cache")


def _only_weights(address: HubAddress, names: Iterable[str]) -> str:
    found = sorted(name for name in names if name.endswith(_SUFFIXES))
    if WEIGHTS in found:
        return WEIGHTS
    if len(found) == 1:
        return found[0]
    rule = f"it has several: name one, as hf:{address.repo}/FILE: " + ", ".join(found[:8])
    raise ValueError(f"{address}: {rule if found else 'the repository holds no weights'}")


def push(repo: str, folder: Path, *, private: bool) -> str:
    """Upload a folder as one commit, making the repository where there is none.

    Args:
        repo: `ORG/NAME`.
        folder: Weights, description and card.
        private: Of a new repository.

    Returns:
        The commit's address.

    Raises:
        ValueError: No permission, no such name, or the Hub cannot be reached.
    """
    with _told(f"{SCHEME}{repo}"):
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Converted by eva02-at"
        )
        return str(done)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn the Hub's errors into one line of what to do; their own texts may name requests."""
    login = "`hf auth login`, or HF_TOKEN, where it is private or yours to write"
    try:
        yield
    except GatedRepoError:
        raise ValueError(f"{what}: its owner gives access on request; ask, then {login}") from None
    except RevisionNotFoundError:
        raise ValueError(f"{what}: the repository has no such revision") from None
    except RepositoryNotFoundError:
        raise ValueError(f"{what}: no such repository on the Hub, or no access: {login}") from None
    except HFValidationError as error:
        raise ValueError(f"{what}: {error}") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise ValueError(
            f"{what} is not in the Hub's cache, and the Hub cannot be reached (HF_HUB_OFFLINE, or "
            "no network). Fetch it once where there is one, with the same HF_HOME"
        ) from None
    except EntryNotFoundError:
        raise ValueError(f"{what}: the repository has no such file") from None
    except HTTPError as error:
        raise ValueError(f"{what}: the Hub answers {_kind(error)}; {login}") from None


def _kind(error: BaseException) -> str:
    """An error without its text: the HTTP status, or its class."""
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return f"HTTP {error.response.status_code}"
    return type(error).__name__
