"""Download files from the Hugging Face hub within a time limit, and explain its errors."""

from __future__ import annotations

import contextlib
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

ANSWER_SECONDS = 3.0  # in which the hub answers a request, if it is there

_HUB_NAME = re.compile(
    r"hf[-_]hub:(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/@]+))?(/(?P<file>.+))?", re.IGNORECASE
)

# Hugging Face's client raises its transport's own exceptions, whichever transport it was built on.
_CLIENTS = ("huggingface_hub", "httpx", "httpx2", "httpcore", "requests", "urllib", "urllib3")


class DownloadError(RuntimeError):
    """Published weights are neither cached nor can be downloaded."""


def fetched(caller: str, source: str | Path) -> str | Path:
    """Download the file of a name ``hf_hub:OWNER/NAME[@REVISION]/FILE``; return others as is."""
    match = hub_name(source)
    if match is None or match["file"] is None:
        return source
    try:
        return download(match["repo"], match["file"], revision=match["revision"], offline=offline())
    except Exception as error:
        told = explained(caller, str(source), error)
        if told is None:
            raise
        raise told from error


def hub_name(name: str | Path) -> re.Match[str] | None:
    """Match a name on the hub, with the groups repo, revision and file (None for a whole model)."""
    return _HUB_NAME.fullmatch(str(name))


def is_hub_name(name: str | Path) -> bool:
    return hub_name(name) is not None


def offline() -> bool:
    """Whether only the cache can be used: HF_HUB_OFFLINE is set, or the hub does not answer."""
    # One request; by itself the client asks six times, with 23 seconds of waiting in between.
    return constants.HF_HUB_OFFLINE or not _hub_answers()


def download(
    repo: str,
    *files: str,
    offline: bool,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """Return the first of some files that the repository has, from the cache alone if offline."""
    if offline:
        # Not by local_files_only=True: the client may send a request of its own before it looks.
        return _cached(repo, files, revision, cache_dir)
    where = {"revision": revision, "cache_dir": cache_dir}
    options: dict[str, Any] = {**where, "etag_timeout": ANSWER_SECONDS}
    *preferred, last = files
    for file in preferred:
        with contextlib.suppress(EntryNotFoundError):
            return Path(hf_hub_download(repo, file, **options))
    return Path(hf_hub_download(repo, last, **options))


def _cached(
    repo: str, files: Iterable[str], revision: str | None, cache_dir: str | Path | None
) -> Path:
    for file in files:
        found = try_to_load_from_cache(repo, file, cache_dir=cache_dir, revision=revision)
        if isinstance(found, str):
            return Path(found)
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "no answer"
    raise LocalEntryNotFoundError(f"{constants.ENDPOINT}: {reason}")


def _hub_answers() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=ANSWER_SECONDS)
    except Exception:  # of the transport, and what it is differs between the client's versions
        return False
    return True


def _is_download_failure(error: Exception) -> bool:
    package = type(error).__module__.split(".", 1)[0]
    return isinstance(error, OSError) or package in _CLIENTS


def explained(caller: str, name: str, error: Exception) -> Exception | None:
    """Translate an error of the hub's client, for a name on the hub or of timm; None for others."""
    match = hub_name(name)
    if match is None:
        what = f"the pretrained weights of {name!r} are"
        return _not_downloaded(caller, what, error) if _is_download_failure(error) else None
    repo = match["repo"]
    reason = None
    if isinstance(error, GatedRepoError):  # which is a RepositoryNotFoundError
        page = f"{constants.ENDPOINT}/{repo}"
        reason = f"{repo} is gated: accept its terms on its page, {page}, then hf auth login"
    elif isinstance(error, RepositoryNotFoundError):
        reason = f"the hub has no repository {repo!r}, or it is private (hf auth login)"
    elif isinstance(error, RevisionNotFoundError):
        reason = f"{repo} has no revision {match['revision']!r} on the hub"
    elif isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        reason = f"{repo} has no file {match['file']!r}"
        if match["file"] is None:
            reason = f"{repo} is no model in timm's layout; name one of its files: {name}/FILE"
    if reason is not None:
        return ValueError(f"{caller}: {reason}")
    return _not_downloaded(caller, f"{name} is", error) if _is_download_failure(error) else None


def _not_downloaded(caller: str, what: str, error: BaseException) -> DownloadError:
    while error.__cause__ is not None:  # to the storage's or the network's own error
        error = error.__cause__
    lines = str(error).strip().splitlines()
    reason = textwrap.shorten(lines[0], 200, placeholder=" ...") if lines else "no reason given"
    return DownloadError(
        f"{caller}: {what} not cached and could not be downloaded "
        f"({type(error).__name__}: {reason})"
    )
