"""Files on the Hugging Face hub, and finding out at once where the hub cannot be reached.

timm downloads models that lie there in its own layout (``hf_hub:OWNER/NAME``). Here are single
files of any layout, ``hf_hub:OWNER/NAME/PATH/IN/IT.pth``, and the errors of both. Knows names and
downloads; nothing of models.
"""

from __future__ import annotations

import contextlib
import errno
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError

from huggingface_hub import HfApi, constants, get_session, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

ANSWER_SECONDS = 5.0  # in which the hub says something, if it is there
SHOWN_FILES = 5

_HUB_NAME = re.compile(
    r"hf[-_]hub:(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/@]+))?(/(?P<file>.+))?", re.IGNORECASE
)
_WEIGHTS = (".pth", ".pt", ".safetensors", ".bin", ".ckpt")

# Hugging Face's client raises its transport's own exceptions, whichever transport it was built on.
_TRANSPORTS = {"httpx", "httpx2", "httpcore", "requests", "urllib", "urllib3"}
_DOWNLOAD_PACKAGES = _TRANSPORTS | {"huggingface_hub"}
_STORAGE_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


class DownloadError(RuntimeError):
    """Published weights are neither on this machine nor to be had from the network."""


def fetched(caller: str, source: str | Path) -> str | Path:
    """The file on this machine that a file's name on the hub stands for.

    Args:
        caller: the public function that asks, named in errors.
        source: ``hf_hub:OWNER/NAME/FILE``, or ``hf_hub:OWNER/NAME@REVISION/FILE``; anything else,
            a whole model's ``hf_hub:OWNER/NAME`` too, is given back as it is.

    Returns:
        The file in the hub's own cache, downloaded if it is not there; or ``source``.

    Raises:
        ValueError: there is no such repository, revision or file.
        DownloadError: the file is not cached, and the hub cannot be reached.
    """
    match = _HUB_NAME.fullmatch(str(source))
    if match is None or match["file"] is None:
        return source
    try:
        with no_waiting_offline():
            return Path(hf_hub_download(match["repo"], match["file"], revision=match["revision"]))
    except Exception as error:
        told = explained(caller, str(source), error)
        if told is None:
            raise
        raise told from error


def is_hub_name(name: str) -> bool:
    """Whether a name is one of the hub's, of a model or of a file.

    Args:
        name: what a user gave.
    """
    return _HUB_NAME.fullmatch(name) is not None


@contextlib.contextmanager
def no_waiting_offline() -> Iterator[None]:
    """Let the hub's client look into its cache alone while the hub does not answer.

    By itself it asks six times with 23 seconds of waiting in between, and timm does so for several
    files. Here one request decides; ``HF_HUB_OFFLINE=1`` saves that one, too.
    """
    if constants.HF_HUB_OFFLINE or _hub_answers():
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def _hub_answers() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=ANSWER_SECONDS)
    except Exception:  # of the transport, and what it is differs between the client's versions
        return False
    return True


def is_download_failure(error: Exception) -> bool:
    """Whether an error comes from a download.

    Args:
        error: what timm or the hub's client raised.
    """
    return isinstance(error, OSError) or _package(error) in _DOWNLOAD_PACKAGES


def explained(caller: str, name: str, error: Exception) -> Exception | None:
    """What a user can do about an error of the hub's.

    Args:
        caller: the public function that asked.
        name: what the user called the model or the file.
        error: what was raised.

    Returns:
        The error to raise in its place; None where this one is not the hub's.
    """
    match = _HUB_NAME.fullmatch(name)
    if match is None:
        return None
    repo = match["repo"]
    if isinstance(error, GatedRepoError):
        return ValueError(
            f"{caller}: {repo} is gated: accept its terms on its page, "
            f"{constants.ENDPOINT}/{repo}, then hf auth login"
        )
    if isinstance(error, RepositoryNotFoundError):
        return ValueError(
            f"{caller}: the hub has no repository {repo!r}, or it is private (hf auth login)"
        )
    if isinstance(error, RevisionNotFoundError):
        return ValueError(f"{caller}: {repo} has no revision {match['revision']!r} on the hub")
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return ValueError(_missing_file(caller, match))
    if is_download_failure(error):
        return not_downloaded(caller, f"{name} is", error)
    return None


def not_downloaded(caller: str, what: str, error: Exception) -> DownloadError:
    """What kept weights from coming: this machine's storage, the hub, or the way to it.

    Args:
        caller: the public function that asked.
        what: the weights, as a user calls them.
        error: for which `is_download_failure` holds.

    Returns:
        The error to raise in its place.
    """
    causes = _causes(error)
    root = causes[-1]
    lines = str(root).strip().splitlines()
    reason = textwrap.shorten(lines[0], 200, placeholder=" ...") if lines else "no reason given"
    if isinstance(root, OSError) and root.errno in _STORAGE_FAULTS and not _transported(causes):
        return DownloadError(f"{caller}: {what} could not be kept in the cache ({reason})")
    answered = any(isinstance(cause, HfHubHTTPError | HTTPError) for cause in causes)
    doubt = "" if answered else "; no network?"
    return DownloadError(
        f"{caller}: {what} not cached and could not be downloaded "
        f"({type(root).__name__}: {reason}{doubt})"
    )


def _causes(error: BaseException) -> list[BaseException]:
    """An error and what it came from: the hub's client and timm wrap what went wrong."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    return causes


def _transported(causes: list[BaseException]) -> bool:
    """Whether the network's own errors are among them; a firewall denies permission, too."""
    return any(_package(cause) in _TRANSPORTS for cause in causes)


def _package(error: BaseException) -> str:
    return type(error).__module__.split(".", 1)[0]


def _missing_file(caller: str, match: re.Match[str]) -> str:
    repo, file = match["repo"], match["file"]
    if file is None:
        what = f"{repo} is no model in timm's layout (it has no config.json)"
    else:
        what = f"{repo} has no file {file!r}"
    names = [f"hf_hub:{repo}/{found}" for found in _weights_in(repo, match["revision"])]
    return f"{caller}: {what}; weights in it: {', '.join(names[:SHOWN_FILES]) or 'none'}"


def _weights_in(repo: str, revision: str | None) -> list[str]:
    with contextlib.suppress(Exception):  # only a hint is lost
        return [
            file
            for file in HfApi().list_repo_files(repo, revision=revision)
            if file.endswith(_WEIGHTS)
        ]
    return []
