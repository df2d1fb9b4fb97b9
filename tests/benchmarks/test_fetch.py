"""Fetching from a real server on this machine: checksums, broken, slow and absent servers, and what stays in place."""

import dataclasses
import gzip
import hashlib
import http.server
import io
import os
import socket
import struct
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.cli import main
from benchmarks.data import DataFormatError, FetchError, available, fetch, load
from benchmarks.data.catalog import CATALOG, Download
from benchmarks.progress import RunProgress


class Server:
    """A file server whose answers can be cut, slowed or refused."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.behave: Callable[[http.server.BaseHTTPRequestHandler, bytes], None] | None = None
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.rsplit("/", 1)[-1]
                owner.requests.append(name)
                if name not in owner.files:
                    self.send_error(404)
                    return
                body = owner.files[name]
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                try:
                    if owner.behave is None:
                        self.wfile.write(body)
                    else:
                        owner.behave(self, body)
                except OSError:
                    pass  # the client has given up, as some tests want it to

            def log_message(self, *args: object) -> None:
                pass

        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.httpd.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.httpd.server_port}/some/where"
        threading.Thread(target=self.httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.httpd.shutdown()
        self.httpd.server_close()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("CURVOPT_DATA", raising=False)
    monkeypatch.setenv("CURVOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = Server()
    yield made
    made.close()


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + array.tobytes(), mtime=0)


def publish(server: Server, monkeypatch: pytest.MonkeyPatch, name: str, files: dict[str, bytes]) -> None:
    """Makes the server the public home of a set: its files and their true checksums."""
    server.files.update(files)
    downloads = tuple(
        dataclasses.replace(old, sha256=hashlib.sha256(files[old.filename]).hexdigest())
        for old in CATALOG[name].downloads
    )
    monkeypatch.setitem(CATALOG, name, dataclasses.replace(CATALOG[name], downloads=downloads))


def mnist_files(rows: int = 7) -> dict[str, bytes]:
    images, labels = np.full((rows, 28, 28), 3, np.uint8), np.arange(rows, dtype=np.uint8)
    return {
        f"{stem}-{what}-idx{array.ndim}-ubyte.gz": idx(array)
        for stem in ("train", "t10k")
        for what, array in (("images", images), ("labels", labels))
    }


TEXT = {"input.txt": b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 300}
TARGET = Path("tinyshakespeare") / "input.txt"


def cached(tmp_path: Path) -> list[str]:
    return sorted(str(p.relative_to(tmp_path / "cache")) for p in (tmp_path / "cache").rglob("*") if p.is_file())


def test_files_arrive_are_loaded_from_the_cache_and_are_not_fetched_twice(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(server, monkeypatch, "mnist", mnist_files())
    seen: list[tuple[str, int, int]] = []
    assert not available("mnist")
    folder = fetch("mnist", base_url=server.url, progress=lambda *args: seen.append(args))
    assert folder == tmp_path / "cache" / "mnist" and available("mnist")
    data = load("mnist")
    assert len(data) == 7 and data.source == f"cache {folder}"
    assert len(server.requests) == 4
    last = {name: (done, total) for name, done, total in seen}
    assert last == {name: (len(body), len(body)) for name, body in mnist_files().items()}
    fetch("mnist", base_url=server.url)
    assert len(server.requests) == 4
    assert cached(tmp_path) == sorted(f"mnist/{name}" for name in mnist_files())


def test_a_corrupt_cached_file_is_replaced_by_a_good_download(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(server, monkeypatch, "tinyshakespeare", TEXT)
    path = tmp_path / "cache" / TARGET
    path.parent.mkdir(parents=True)
    path.write_bytes(TEXT["input.txt"][:100])
    fetch("tinyshakespeare", base_url=server.url)
    assert path.read_bytes() == TEXT["input.txt"]


def cut(handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
    handler.wfile.write(body[: len(body) // 2])
    handler.close_connection = True


def wrong_bytes(handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
    handler.wfile.write(body[:-1] + b"!")


def stall(handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
    handler.wfile.write(body[:500])
    handler.wfile.flush()
    time.sleep(30)


def drip(handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
    for i in range(len(body)):
        handler.wfile.write(body[i : i + 1])
        handler.wfile.flush()
        time.sleep(0.02)


# A broken download in every way that a server can break one, with what the message must say.
BROKEN = [
    (cut, {}, r"the connection ended after 9,\d+ of 18,\d+ bytes"),
    (wrong_bytes, {}, r"its sha256 is not \w{12}\.\.\.: the download is broken or the public file has changed"),
    (stall, {"timeout": 0.4}, r"time-out \(no data for 0\.4 s after 500 bytes\)"),
    (drip, {"total_timeout": 0.6}, r"time-out \(\d+ of 18,\d+ bytes after 0\.6 s\)"),
]


@pytest.mark.parametrize("before", [None, b"the user's own good file"])
@pytest.mark.parametrize(("behave", "options", "match"), BROKEN, ids=[case[0].__name__ for case in BROKEN])
def test_a_broken_download_says_so_and_replaces_nothing(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    behave: Callable[[http.server.BaseHTTPRequestHandler, bytes], None],
    options: dict[str, float],
    match: str,
    before: bytes | None,
) -> None:
    publish(server, monkeypatch, "tinyshakespeare", TEXT)
    path = tmp_path / "cache" / TARGET
    if before is not None:
        path.parent.mkdir(parents=True)
        path.write_bytes(before)
    server.behave = behave
    with pytest.raises(FetchError, match=match) as caught:
        fetch("tinyshakespeare", base_url=server.url, **options)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "could not fetch input.txt for tinyshakespeare from http://127.0.0.1" in text
    assert "set CURVOPT_DATA to a folder that holds tinyshakespeare/ with input.txt" in text
    if before is None:
        assert "nothing was written" in text and cached(tmp_path) == []
    else:
        assert "the file that was there is untouched" in text
        assert path.read_bytes() == before and cached(tmp_path) == [str(TARGET)]


def test_server_down_and_file_absent(server: Server, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(FetchError, match="train-images-idx3-ubyte.gz for mnist .*no connection .*CURVOPT_DATA"):
        fetch("mnist", base_url=f"http://127.0.0.1:{port}")
    with pytest.raises(ConnectionError, match="404 Client Error"):
        fetch("mnist", base_url=server.url)
    with pytest.raises(FetchError, match="digits comes with scikit-learn: there is nothing to fetch"):
        fetch("digits")
    assert cached(tmp_path) == []


def tar_gz(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as container:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            container.addfile(info, io.BytesIO(body))
    return out.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as container:
        for name, body in members.items():
            container.writestr(name, body)
    return out.getvalue()


def cifar_members(batches: int = 5) -> dict[str, bytes]:
    row = bytes([7]) + bytes(3072)
    names = [f"data_batch_{i + 1}.bin" for i in range(batches)] + ["test_batch.bin"]
    members = {f"cifar-10-batches-bin/{name}": row * 2 for name in names}
    return {**members, "cifar-10-batches-bin/batches.meta.txt": b"airplane\n", "../../evil.txt": b"out of the folder"}


def test_archives_are_unpacked_to_the_wanted_files_only(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CATALOG, "cifar-10", dataclasses.replace(CATALOG["cifar-10"], rows=(10, 2)))
    publish(server, monkeypatch, "cifar-10", {"cifar-10-binary.tar.gz": tar_gz(cifar_members())})
    glue = {"SST-2/train.tsv": b"sentence\tlabel\nfine \t1\n", "SST-2/dev.tsv": b"sentence\tlabel\nbad \t0\n"}
    publish(server, monkeypatch, "sst-2", {"SST-2.zip": zipped({**glue, "SST-2/original/x.txt": b"-"})})
    fetch("cifar-10", base_url=server.url)
    fetch("sst-2", base_url=server.url)
    cifar = load("cifar-10")
    assert len(cifar) == 10 and "training batches" not in cifar.note
    assert load("sst-2", train=False).sentences == ("bad",)  # type: ignore[attr-defined]
    wanted = [name for name in [*cifar_members(), *glue] if not name.startswith("..")]
    assert cached(tmp_path) == sorted(wanted)
    assert not list(tmp_path.parent.glob("**/evil.txt"))
    fetch("cifar-10", base_url=server.url)
    fetch("sst-2", base_url=server.url)
    assert len(server.requests) == 2  # what is whole in the cache is kept
    (tmp_path / "cache" / "cifar-10-batches-bin" / "data_batch_2.bin").write_bytes(b"torn")
    fetch("cifar-10", base_url=server.url)
    assert len(server.requests) == 3 and len(load("cifar-10")) == 10


def test_an_archive_without_the_files_is_an_error_that_names_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(server, monkeypatch, "cifar-10", {"cifar-10-binary.tar.gz": tar_gz(cifar_members(batches=3))})
    with pytest.raises(DataFormatError, match=r"cifar-10-binary.tar.gz: can't unpack cifar-10: .*data_batch_4.bin"):
        fetch("cifar-10", base_url=server.url)


def test_the_command_fetches_with_a_bar_that_names_the_file(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(server, monkeypatch, "mnist", mnist_files())
    here = tuple(dataclasses.replace(d, url=f"{server.url}/{d.filename}") for d in CATALOG["mnist"].downloads)
    monkeypatch.setitem(CATALOG, "mnist", dataclasses.replace(CATALOG["mnist"], downloads=here))
    bars: list[str] = []
    notes: list[str] = []
    begin, advance = RunProgress.begin, RunProgress.advance
    monkeypatch.setattr(
        RunProgress, "begin", lambda self, title, total, done=0: (bars.append(title), begin(self, title, total, done))
    )
    monkeypatch.setattr(
        RunProgress, "advance", lambda self, done, note="": (notes.append(note), advance(self, done, note))
    )
    assert main(["fetch", "mnist"]) == 0
    assert str(tmp_path / "cache" / "mnist") in capsys.readouterr().out.replace("\n", "")
    assert bars == [f"mnist: {d.filename} (KiB)" for d in here] and set(notes) == {"downloading"}
    server.files = {}
    (tmp_path / "cache" / "mnist" / here[0].filename).unlink()
    assert main(["fetch", "mnist"]) == 2
    assert "error: could not fetch train-images-idx3-ubyte.gz for mnist" in capsys.readouterr().err


def test_every_download_has_a_sha256_and_covers_the_files_of_the_set() -> None:
    for spec in CATALOG.values():
        for download in spec.downloads:
            assert len(download.sha256) == 64 and int(download.sha256, 16) and download.url.startswith("http")
        brought = {name for d in spec.downloads for name in ([m[1] for m in d.members] or [d.filename])}
        assert all(any(name in brought for name in alternatives) for alternatives in (*spec.train, *spec.test))
    assert Download("http://x/y/z.gz", "0" * 64).filename == "z.gz"


DATA = os.environ.get("CURVOPT_DATA", "")


def test_the_real_files_pass_the_published_checksums(server: Server) -> None:
    """Serves the real MNIST and Fashion-MNIST labels and tinyshakespeare, and fetches with the catalogue as it is."""
    wanted = ["mnist", "fashion-mnist", "tinyshakespeare"]
    lacking = [name for name in wanted if not (DATA and available(name, root=DATA))]
    if lacking:
        reason = f"{', '.join(lacking)}: not in CURVOPT_DATA={DATA!r}"
        if os.environ.get("CURVOPT_REQUIRE_DATA") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    for name in wanted:
        folder = Path(DATA) / CATALOG[name].folders[0]
        server.files = {d.filename: (folder / d.filename).read_bytes() for d in CATALOG[name].downloads}
        fetch(name, base_url=server.url)
        assert load(name, train=False).source.startswith("cache") and load(name, train=False).note == ""
