"""`fetch`: a public download into the user's cache, by pooch, with checksum and time-outs.

Only a file whose checksum is right is renamed into place, so a broken download never replaces a good file.
"""

from __future__ import annotations

import logging
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from curvopt._errors import MissingExtraError

from ..files import atomic_write_bytes
from .catalog import Download, Spec, spec_of
from .errors import DataError, DataFormatError, FetchError
from .loaders import load
from .store import cache_folder

__all__ = ["fetch"]

_CHUNK = 1 << 16
Progress = Callable[[str, int, int], None]


def fetch(
    name: str,
    *,
    base_url: str | None = None,
    timeout: float = 30.0,
    total_timeout: float = 1800.0,
    progress: Progress | None = None,
) -> Path:
    """Brings a data set into the cache; files that are already there with the right checksum are kept.

    Args:
        name: The data set.
        base_url: A mirror: every file is taken from here, under its own name, instead of its public address. The
            checksums stay the same.
        timeout: Seconds without a byte after which the download is given up.
        total_timeout: Seconds for one file, so that a server that drips can't hold the caller.
        progress: Called with (file name, bytes so far, bytes in all or 0 if unknown).

    Returns:
        The folder of the set in the cache.

    Raises:
        FetchError: If a file can't be had; names the file, the cause and CURVOPT_DATA.
        MissingExtraError: If pooch is not installed.
    """
    spec = spec_of(name)
    if not spec.downloads:
        raise FetchError(f"{spec.name} comes with scikit-learn: there is nothing to fetch")
    folder = cache_folder() / spec.folders[0]
    for download in spec.downloads:
        url = download.url if base_url is None else f"{base_url.rstrip('/')}/{download.filename}"
        downloader = _Downloader(download.filename, timeout, total_timeout, progress)
        if download.members:
            if all((folder / target).is_file() for _, target in download.members) and _reads(spec):
                continue
            archive = _retrieve(spec, download, url, cache_folder() / "downloads", downloader)
            _unpack(spec, archive, download, folder)
            archive.unlink()
        else:
            _retrieve(spec, download, url, folder, downloader)
    return folder


def _reads(spec: Spec) -> bool:
    """Whether what an archive left in the cache is whole: the archive's checksum says nothing about it later."""
    try:
        for train in (True, False):
            load(spec.name, root=cache_folder(), train=train)
    except DataError:
        return False
    return True


def _retrieve(spec: Spec, download: Download, url: str, folder: Path, downloader: _Downloader) -> Path:
    pooch = _import_pooch()
    import requests.exceptions

    # pooch logs at info level what it does; the caller has `progress` and our errors instead.
    pooch.get_logger().setLevel(logging.WARNING)
    try:
        path = pooch.retrieve(
            url, known_hash=f"sha256:{download.sha256}", fname=download.filename, path=folder, downloader=downloader
        )
    except (requests.exceptions.RequestException, TimeoutError, OSError) as error:
        raise _failed(spec, url, folder / download.filename, _reason(error)) from error
    except ValueError as error:  # pooch's checksum mismatch
        reason = f"its sha256 is not {download.sha256[:12]}...: the download is broken or the public file has changed"
        raise _failed(spec, url, folder / download.filename, reason) from error
    return Path(path)


def _import_pooch() -> Any:
    try:
        import pooch
    except ImportError as error:
        raise MissingExtraError('fetching data needs pooch: pip install "curvopt-torch[bench]"') from error
    return pooch


def _failed(spec: Spec, url: str, target: Path, reason: str) -> FetchError:
    kept = "the file that was there is untouched" if target.is_file() else "nothing was written"
    return FetchError(
        f"could not fetch {target.name} for {spec.name} from {url}: {reason}; {kept}. Without a network, set "
        f"CURVOPT_DATA to a folder that holds {spec.folders[0]}/"
        + (f" with {', '.join(alternatives[0] for alternatives in spec.train)} and the test files")
    )


def _reason(error: Exception) -> str:
    import requests.exceptions

    if isinstance(error, TimeoutError | requests.exceptions.Timeout):
        return f"time-out ({error})"
    if isinstance(error, requests.exceptions.HTTPError):
        return str(error)
    if isinstance(error, requests.exceptions.ConnectionError):
        return f"no connection ({type(error).__name__}: {str(error)[:200]})"
    return f"{type(error).__name__}: {error}"


class _Downloader:
    """A pooch downloader that also ends when a server sends, but too slowly.

    requests' own time-out only bounds the wait for the next bytes; a server that drips one byte a second passes it
    for ever. Here each read returns what has arrived (at most one system call), and the clock is looked at in between.
    """

    def __init__(self, filename: str, timeout: float, total_timeout: float, progress: Progress | None) -> None:
        self.filename = filename
        self.timeout = timeout
        self.total_timeout = total_timeout
        self.progress = progress

    def __call__(self, url: str, output_file: str, pooch: Any, check_only: bool = False) -> None:
        import requests
        import urllib3.exceptions

        deadline = time.monotonic() + self.total_timeout
        wait = min(self.timeout, self.total_timeout)
        # No content encoding: a gzip file must arrive as the bytes that its checksum speaks of.
        headers = {"Accept-Encoding": "identity"}
        with requests.get(url, stream=True, timeout=wait, headers=headers) as response:
            response.raise_for_status()
            expected = int(response.headers.get("Content-Length") or 0)
            received = 0
            read = getattr(response.raw, "read1", None) or response.raw.read  # read1 came with urllib3 2.1
            with open(output_file, "wb") as handle:
                while True:
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"{received:,} of {expected:,} bytes after {self.total_timeout:g} s")
                    try:
                        chunk = read(_CHUNK)
                    except urllib3.exceptions.ReadTimeoutError:
                        raise TimeoutError(f"no data for {wait:g} s after {received:,} bytes") from None
                    except (urllib3.exceptions.HTTPError, OSError) as error:
                        raise OSError(
                            f"the connection ended after {received:,} of {expected:,} bytes ({error})"
                        ) from error
                    if not chunk:
                        break
                    handle.write(chunk)
                    received += len(chunk)
                    if self.progress is not None:
                        self.progress(self.filename, received, expected)
            if expected and received != expected:
                raise OSError(f"the connection ended after {received:,} of {expected:,} bytes")


def _unpack(spec: Spec, archive: Path, download: Download, folder: Path) -> None:
    """Writes the wanted members, and only those, each whole or not at all."""
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as container:
                for member, target in download.members:
                    atomic_write_bytes(folder / target, container.read(member))
        else:
            with tarfile.open(archive) as container:
                for member, target in download.members:
                    handle = container.extractfile(member)
                    if handle is None:
                        raise KeyError(member)
                    atomic_write_bytes(folder / target, handle.read())
    except (KeyError, zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
        raise DataFormatError(f"{archive}: can't unpack {spec.name}: {type(error).__name__}: {error}") from error
