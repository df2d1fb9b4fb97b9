"""Loaders: right numbers from every public format, the order of the places, and a clear error for every broken file."""

import dataclasses
import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.data import (
    CharData,
    DataError,
    DataFormatError,
    DataMissingError,
    ImageData,
    SentenceData,
    Vocabulary,
    available,
    channel_statistics,
    char_windows,
    load,
    load_images,
    standardize,
)
from benchmarks.data.catalog import CATALOG

RNG = np.random.default_rng(0)
CIFAR_ROW = 3073


@pytest.fixture(autouse=True)
def empty_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No data folder and an empty cache, unless a test says otherwise."""
    monkeypatch.delenv("CURVOPT_DATA", raising=False)
    monkeypatch.setenv("CURVOPT_CACHE", str(tmp_path / "cache"))


def expect(monkeypatch: pytest.MonkeyPatch, name: str, rows: tuple[int, int]) -> None:
    """A set as small as the test's files."""
    monkeypatch.setitem(CATALOG, name, dataclasses.replace(CATALOG[name], rows=rows))


def gzipped_plain(raw: bytes) -> bytes:
    """gzip without the clock in its header, so that every test process sees the same parameters."""
    return gzip.compress(raw, mtime=0)


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx_set(folder: Path, rows: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An MNIST of a few rows; returns its training images and labels."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    images = rng.integers(0, 256, (rows, 28, 28), dtype=np.uint8)
    labels = rng.integers(0, 10, rows, dtype=np.uint8)
    for stem in ("train", "t10k"):
        (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzipped_plain(idx_bytes(images)))
        (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzipped_plain(idx_bytes(labels)))
    return images, labels


def write_cifar(folder: Path, batches: tuple[int, ...] = (1,), rows: int = 4) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    table = RNG.integers(0, 256, (rows * (len(batches) + 1), CIFAR_ROW), dtype=np.uint8)
    table[:, 0] %= 10
    names = [f"data_batch_{i}.bin" for i in batches] + ["test_batch.bin"]
    for name, part in zip(names, np.split(table, len(names)), strict=True):
        (folder / name).write_bytes(part.tobytes())
    return table


# --- what the loaders return ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "fashion_mnist"])
def test_idx_images_and_labels_are_those_in_the_file(tmp_path: Path, name: str) -> None:
    folder = "mnist" if name == "mnist" else "fashion-mnist"
    images, labels = write_idx_set(tmp_path / folder)
    data = load_images(name, root=tmp_path)
    assert data.inputs.dtype == torch.uint8 and data.targets.dtype == torch.int64
    assert data.inputs.shape == (12, 1, 28, 28) and data.classes == 10 and len(data) == 12
    np.testing.assert_array_equal(data.inputs[:, 0].numpy(), images)
    np.testing.assert_array_equal(data.targets.numpy(), labels)
    assert data.source == f"folder {tmp_path / folder}"
    assert data.note == "12 images where the public train split has 60,000"
    assert data.describe().startswith(f"{data.name} train: 12 rows from folder")


def test_plain_idx_and_the_nested_folder_of_other_tools(tmp_path: Path) -> None:
    images, _ = write_idx_set(tmp_path / "MNIST" / "raw")
    for path in (tmp_path / "MNIST" / "raw").iterdir():
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    np.testing.assert_array_equal(load_images("mnist", root=tmp_path, train=False).inputs[:, 0].numpy(), images)


def test_limit_takes_the_first_rows_and_normalize_is_the_textbook_formula(tmp_path: Path) -> None:
    images, labels = write_idx_set(tmp_path / "mnist")
    data = load_images("mnist", root=tmp_path, limit=5, normalize=True)
    assert data.inputs.dtype == torch.float32 and data.inputs.is_contiguous()
    expected = (images[:5].astype(np.float64) / 255 - 0.1307) / 0.3081
    # three float32 roundings of numbers below 3: a few eps
    np.testing.assert_allclose(data.inputs[:, 0].numpy(), expected, rtol=0, atol=8 * np.finfo(np.float32).eps)
    np.testing.assert_array_equal(data.targets.numpy(), labels[:5])
    with pytest.raises(DataError, match="limit=13 for mnist: only 12 train rows are there"):
        load("mnist", root=tmp_path, limit=13)
    with pytest.raises(DataError, match="limit=0 for mnist: expected None or at least 1"):
        load("mnist", root=tmp_path, limit=0)


def test_cifar_reads_the_batches_that_are_there_and_says_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expect(monkeypatch, "cifar-10", (20, 4))
    table = write_cifar(tmp_path / "cifar-10-batches-bin", batches=(1, 3))
    data = load_images("cifar-10", root=tmp_path)
    assert data.inputs.shape == (8, 3, 32, 32)
    np.testing.assert_array_equal(data.inputs.reshape(8, -1).numpy(), table[:8, 1:])
    np.testing.assert_array_equal(data.targets.numpy(), table[:8, 0])
    assert "2 of the 5 training batches (1, 3)" in data.note and "public train split has 20" in data.note
    test = load_images("cifar10", root=tmp_path, train=False)
    np.testing.assert_array_equal(test.targets.numpy(), table[8:, 0])
    assert "batches" not in test.note
    normal = load_images("cifar-10", root=tmp_path, normalize=True)
    expected = (table[2, 1 + 1024] / 255 - 0.4822) / 0.2435  # row 2, first green pixel
    assert normal.inputs[2, 1, 0, 0].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("header", ["", "sentence\tlabel\n"])
@pytest.mark.parametrize("end", ["\n", "", "\r\n"])
def test_sst2_takes_both_public_layouts(tmp_path: Path, header: str, end: str) -> None:
    folder = tmp_path / "SST-2"
    folder.mkdir()
    body = "a fine film \t1\nthe label of a sentence\t0" + end
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_bytes((header + body).encode())
    data = load("sst-2", root=tmp_path, limit=2)
    assert isinstance(data, SentenceData)
    assert data.sentences == ("a fine film", "the label of a sentence")
    assert data.targets.tolist() == [1, 0] and data.targets.dtype == torch.int64 and data.classes == 2


def test_text_ids_alphabet_and_the_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect(monkeypatch, "tinyshakespeare", (100, 100))
    text = "".join(chr(97 + i % 26) for i in range(95)) + "Ä\r\n\U0001f600."
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_bytes(text.encode())
    train, test = load("tinyshakespeare", root=tmp_path), load("tinyshakespeare", root=tmp_path, train=False)
    assert isinstance(train, CharData) and isinstance(test, CharData)
    assert train.alphabet == test.alphabet == "".join(sorted(set(text)))
    assert train.decode(train.ids) + test.decode(test.ids) == text and len(train) == 90
    assert train.ids.dtype == torch.int64


def test_digits_need_no_file_and_split_by_seed() -> None:
    from sklearn.datasets import load_digits

    train, test = load_images("digits"), load_images("digits", train=False)
    assert train.source == "bundled with scikit-learn" and available("digits")
    assert (len(train), len(test)) == (1437, 360) and train.inputs.shape[1:] == (1, 8, 8)
    whole = load_digits()
    both = np.concatenate([train.inputs.numpy(), test.inputs.numpy()]).reshape(1797, -1)
    # the two splits are the whole set: same rows, each once
    assert sorted(map(bytes, both)) == sorted(map(bytes, whole.images.astype(np.uint8).reshape(1797, -1)))
    assert torch.equal(load_images("digits").inputs, train.inputs)
    assert not torch.equal(load_images("digits", split_seed=1).inputs, train.inputs)
    mean, std = channel_statistics(load_images("digits", normalize=True).inputs.mul(1), top=1)
    assert abs(mean[0]) < 0.01 and abs(std[0] - 1) < 0.01


# --- where they look -----------------------------------------------------------------------------------------------


def test_order_of_places_root_then_variable_then_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {name: tmp_path / name for name in ("root", "data", "cache")}
    for seed, place in enumerate(places.values()):
        write_idx_set(place / "mnist", rows=12 + seed, seed=seed)
    assert (len(load("mnist")), load("mnist").source) == (14, f"cache {tmp_path / 'cache' / 'mnist'}")
    monkeypatch.setenv("CURVOPT_DATA", str(places["data"]))
    assert (len(load("mnist")), load("mnist").source) == (13, f"folder {tmp_path / 'data' / 'mnist'}")
    assert len(load("mnist", root=places["root"])) == 12


def test_a_folder_without_the_set_falls_back_to_the_cache_but_an_explicit_root_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_idx_set(tmp_path / "cache" / "mnist")
    monkeypatch.setenv("CURVOPT_DATA", str(tmp_path))
    assert load("mnist").source.startswith("cache")
    with pytest.raises(DataMissingError, match="nowhere is no folder"):
        load("mnist", root=tmp_path / "nowhere")
    assert available("mnist") and not available("mnist", root=tmp_path / "nowhere") and not available("cifar-10")


def test_missing_names_the_file_the_variable_and_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load("fashion-mnist")
    text = str(caught.value)
    assert isinstance(caught.value, DataMissingError)
    for part in (
        "fashion-mnist (training files) was not found",
        "CURVOPT_DATA is not set",
        "fashion-mnist/train-images-idx3-ubyte.gz",
        "python -m benchmarks fetch fashion-mnist",
    ):
        assert part in text
    write_idx_set(tmp_path / "mnist")
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    monkeypatch.setenv("CURVOPT_DATA", str(tmp_path))
    assert len(load("mnist")) == 12 and not available("mnist")
    with pytest.raises(DataMissingError, match=r"mnist/t10k-labels-idx1-ubyte\.gz is absent"):
        load("mnist", train=False)


def test_an_unknown_name_lists_the_names_and_the_nearest() -> None:
    with pytest.raises(DataError, match=r"no data set named 'mnits'; there are mnist, .*did you mean 'mnist'\?"):
        load("mnits")
    with pytest.raises(DataError, match="sst-2, which holds text"):
        load("sst-2", normalize=True)
    with pytest.raises(DataError, match="digits is ImageData, not CharData"):
        from benchmarks.data import load_chars

        load_chars("digits")


# --- broken files --------------------------------------------------------------------------------------------------

GOOD = gzipped_plain(idx_bytes(np.zeros((12, 28, 28), dtype=np.uint8)))
IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


def flipped(data: bytes) -> bytes:
    middle = len(data) - 6  # inside the stored crc32
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        (IMAGES, GOOD[:-20], r"truncated gzip file \(\d+ bytes\): its end is missing"),
        (IMAGES, GOOD[:5], "truncated gzip file"),
        (IMAGES, flipped(GOOD), "corrupt gzip file: CRC check failed"),
        (IMAGES, b"", "no gzip file: it starts with nothing"),
        (IMAGES, b"<html>404</html>", "no gzip file: it starts with 3c 68, expected 1f 8b"),
        (IMAGES, gzipped_plain(b""), "no idx file: it starts with nothing"),
        (IMAGES, gzipped_plain(b"<html>"), "no idx file: it starts with 3c 68 74 6d, expected 00 00 08 03"),
        (IMAGES, gzipped_plain(b"\0\0\x08\x03\0\0"), "truncated in its header: 6 bytes"),
        (IMAGES, gzipped_plain(b"\0\0\x0d\x03" + bytes(12)), "idx element type 0x0d with 3 dimensions"),
        (IMAGES, gzipped_plain(idx_bytes(np.zeros(12, np.uint8))), "with 1 dimensions, expected unsigned bytes"),
        (IMAGES, gzipped_plain(gzip.decompress(GOOD)[:-1]), r"truncated: 9423 bytes unpacked, .*12x28x28\) says 9424"),
        (IMAGES, gzipped_plain(gzip.decompress(GOOD) + b"x"), "too long: 9425 bytes unpacked"),
        (IMAGES, gzipped_plain(idx_bytes(np.zeros((12, 28, 27), np.uint8))), "images of 28x27 pixels, expected 28x28"),
        (LABELS, gzipped_plain(idx_bytes(np.zeros(11, np.uint8))), "11 labels for the 12 images"),
        (LABELS, gzipped_plain(idx_bytes(np.full(12, 10, np.uint8))), "label 10 in row 0, expected 0 to 9"),
    ],
)
def test_broken_idx_files(tmp_path: Path, file: str, content: bytes, match: str) -> None:
    write_idx_set(tmp_path / "mnist")
    path = tmp_path / "mnist" / file
    path.write_bytes(content)
    with pytest.raises(DataFormatError, match=match) as caught:
        load("mnist", root=tmp_path)
    assert str(path) in str(caught.value)


def test_no_rows_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "mnist"
    folder.mkdir()
    (folder / IMAGES).write_bytes(gzipped_plain(idx_bytes(np.zeros((0, 28, 28), np.uint8))))
    (folder / LABELS).write_bytes(gzipped_plain(idx_bytes(np.zeros(0, np.uint8))))
    with pytest.raises(DataFormatError, match="holds no rows"):
        load("mnist", root=tmp_path)


def test_broken_cifar_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect(monkeypatch, "cifar-10", (20, 4))
    table = write_cifar(tmp_path / "cifar-10-batches-bin")
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_1.bin"
    path.write_bytes(table[:4].tobytes()[:-1])
    with pytest.raises(DataFormatError, match=r"data_batch_1.bin: truncated .*12291 bytes .* \(3072 left over\)"):
        load("cifar-10", root=tmp_path)
    table[1, 0] = 200
    path.write_bytes(table[:4].tobytes())
    with pytest.raises(DataFormatError, match="data_batch_1.bin: label 200 in row 1, expected 0 to 9"):
        load("cifar-10", root=tmp_path)
    path.write_bytes(b"")
    with pytest.raises(DataFormatError, match="data_batch_1.bin: holds no rows"):
        load("cifar-10", root=tmp_path)
    path.write_bytes(table[:3].tobytes())  # cut off between two rows
    with pytest.raises(DataFormatError, match="data_batch_1.bin: truncated: 3 rows, expected 4"):
        load("cifar-10", root=tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"a fine film\t1\na torn li", r"train.tsv, line 2: expected 'sentence TAB label', found 1 field\(s\)"),
        (b"a fine film\t2\n", "train.tsv, line 1: label '2', expected 0 or 1"),
        (b"sentence\tlabel\nfine\tpositive\n", "train.tsv, line 2: label 'positive'"),
        (b"fine\t1\n\nbad\t0\n", "train.tsv, line 2: expected"),
        (b"index\tsentence\n0\tfine\n", "train.tsv: has no labels .GLUE's test set"),
        (b"sentence\tlabel\n", "train.tsv: holds no rows"),
        (b"", "train.tsv: holds no rows"),
        (b"caf\xe9\t1\n", "train.tsv: not UTF-8 text: byte 3 is 0xe9"),
    ],
)
def test_broken_sentences(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "SST-2" / "train.tsv").write_bytes(content)
    with pytest.raises(DataFormatError, match=match):
        load("sst-2", root=tmp_path)


def test_broken_text_and_the_hint_for_a_cached_file(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "cache"):
        (place / "tinyshakespeare").mkdir(parents=True)
        (place / "tinyshakespeare" / "input.txt").write_bytes(b"")
    (tmp_path / "tinyshakespeare" / "input.txt").write_bytes(b"First Citizen:")
    with pytest.raises(DataFormatError, match="input.txt: truncated: 14 characters, expected 1,115,394"):
        load("tinyshakespeare", root=tmp_path)
    (tmp_path / "tinyshakespeare" / "input.txt").write_bytes(b"")
    with pytest.raises(DataFormatError, match="input.txt: empty file$"):
        load("tinyshakespeare", root=tmp_path)
    with pytest.raises(DataFormatError, match="Fetch it again: python -m benchmarks fetch tinyshakespeare"):
        load("tinyshakespeare")


# --- preparing -----------------------------------------------------------------------------------------------------


def test_standardize_checks_shapes_and_inverts_the_statistics() -> None:
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = channel_statistics(images)
    reference = images.double().div(255).permute(1, 0, 2, 3).reshape(3, -1)
    torch.testing.assert_close(torch.tensor(mean, dtype=torch.float64), reference.mean(1))
    torch.testing.assert_close(torch.tensor(std, dtype=torch.float64), reference.std(1, correction=0))
    out = standardize(images, mean, std).double().permute(1, 0, 2, 3).reshape(3, -1)
    # 9,600 numbers rounded to float32: mean 0 and deviation 1 within a few eps
    assert out.mean(1).abs().max() < 1e-6 and (out.std(1, correction=0) - 1).abs().max() < 1e-6
    with pytest.raises(DataError, match=r"shape \(50, 3, 8, 8\) with 1 means and 1 deviations"):
        standardize(images, (0.1,), (0.2,))


def test_char_windows_cover_the_text_once_and_targets_are_the_next_character() -> None:
    ids = torch.arange(200)
    x, y = char_windows(ids, 64)
    assert x.shape == y.shape == (3, 64)
    assert torch.equal(x.reshape(-1), ids[:192]) and torch.equal(y, x + 1)
    assert torch.equal(char_windows(ids, 64, limit=2)[0], x[:2])
    assert char_windows(ids[:65], 64)[1][0, -1] == 64
    for bad in ({"ids": ids[:64]}, {"ids": ids[:0]}, {"ids": ids, "limit": 4}, {"ids": ids, "limit": 0}):
        with pytest.raises(DataError, match="windows of 64, asked for"):
            char_windows(length=64, **bad)  # type: ignore[arg-type]


def test_vocabulary_counts_ranks_and_encodes() -> None:
    sentences = ["b a a", "b a c", "d d c ", ""]
    words = Vocabulary.build(sentences)
    assert words.words == ("a", "b", "c", "d") and len(words) == 6
    assert Vocabulary.build(sentences, min_count=3).words == ("a",)
    assert Vocabulary.build(sentences, max_words=2).words == ("a", "b")
    ids, lengths = words.encode(["a x b c d", "d", ""], length=3)
    assert ids.tolist() == [[2, 1, 3], [5, 0, 0], [1, 0, 0]] and lengths.tolist() == [3, 1, 1]
    assert ids.dtype == torch.int64
    with pytest.raises(DataError, match="length=0: expected at least 1"):
        words.encode(["a"], length=0)


# --- the real files, where a folder holds them ---------------------------------------------------------------------

FOLDER = os.environ.get("CURVOPT_DATA", "")
CACHE = os.environ.get("CURVOPT_CACHE", "")
# name, split, rows, a fact of the public set that a wrong byte order, offset or label column would break
REAL = [
    ("mnist", True, 60_000, {"first": [5, 0, 4, 1, 9, 2, 1, 3, 1, 4], "mean": 0.1307}),
    ("mnist", False, 10_000, {"first": [7, 2, 1, 0, 4, 1, 4, 9, 5, 9], "mean": 0.1325}),
    ("fashion-mnist", True, 60_000, {"first": [9, 0, 0, 3, 0, 2, 7, 2, 5, 5], "mean": 0.2860}),
    ("cifar-10", True, None, {"mean": 0.473}),
    ("sst-2", True, None, {}),
    ("sst-2", False, 872, {}),
    ("tinyshakespeare", True, 1_003_854, {}),
]


@pytest.mark.parametrize(("name", "train", "rows", "facts"), REAL)
def test_real_files(
    name: str, train: bool, rows: int | None, facts: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CURVOPT_DATA", FOLDER)
    monkeypatch.setenv("CURVOPT_CACHE", CACHE)
    if not available(name):
        reason = f"{name} is neither in CURVOPT_DATA={FOLDER!r} nor in the cache"
        if os.environ.get("CURVOPT_REQUIRE_DATA") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    data = load(name, train=train)
    assert rows is None or len(data) == rows
    if isinstance(data, ImageData):
        assert data.targets.bincount(minlength=10).min() > 0.08 * len(data)
        if "first" in facts:
            assert data.targets[:10].tolist() == facts["first"]
        assert float(np.mean(channel_statistics(data.inputs)[0])) == pytest.approx(facts["mean"], abs=3e-3)
    elif isinstance(data, SentenceData):
        assert 0.4 < data.targets.double().mean() < 0.6
        assert data.source.startswith(("folder", "cache"))
    else:
        assert isinstance(data, CharData) and len(data.alphabet) == 65
        assert data.decode(data.ids[:14]) == "First Citizen:"
