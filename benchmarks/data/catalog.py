"""What each data set is: its files, where they may lie, its public rows, where a download comes from and its checksum.

The sha256 of the idx files and of tinyshakespeare were computed from the published files; those of the two archives
are the ones that several independent projects pin for the same address.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .errors import DataError

__all__ = ["CATALOG", "Download", "Spec", "spec_of"]


@dataclass(frozen=True)
class Download:
    """One file to fetch.

    Attributes:
        url: Its public address.
        sha256: The checksum of its bytes.
        members: For an archive, (path inside it, file name in the set's folder) of each file wanted; empty when the
            download itself is the file.
    """

    url: str
    sha256: str
    members: tuple[tuple[str, str], ...] = ()

    @property
    def filename(self) -> str:
        """The last part of the address."""
        return self.url.rsplit("/", 1)[1]


@dataclass(frozen=True)
class Spec:
    """A data set on disk.

    Attributes:
        name: The name that `load` takes.
        folders: Folder names in order of preference, relative to a data folder; the first is where `fetch` puts it.
        train, test: The files of each split; each entry is a tuple of alternatives of which one must be there.
        rows: Public numbers of rows (train, test); for a text its characters.
        classes: Number of labels; 0 for a text without labels.
        mean, std: Per-channel statistics of the public training images scaled to [0, 1].
        downloads: What `fetch` brings; empty for a bundled set.
    """

    name: str
    folders: tuple[str, ...]
    train: tuple[tuple[str, ...], ...]
    test: tuple[tuple[str, ...], ...]
    rows: tuple[int, int]
    classes: int = 10
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    downloads: tuple[Download, ...] = field(default=())


_CIFAR_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", "batches.meta.txt")


def _idx(split: str) -> tuple[tuple[str, ...], ...]:
    stems = (f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte")
    return tuple((f"{stem}.gz", stem) for stem in stems)


def _idx_downloads(base: str, *sums: str) -> tuple[Download, ...]:
    names = [alternatives[0] for split in ("train", "t10k") for alternatives in _idx(split)]
    return tuple(Download(base + name, digest) for name, digest in zip(names, sums, strict=True))


CATALOG: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec(
            name="mnist",
            folders=("mnist", "MNIST", "MNIST/raw"),
            train=_idx("train"),
            test=_idx("t10k"),
            rows=(60_000, 10_000),
            mean=(0.1307,),
            std=(0.3081,),
            downloads=_idx_downloads(
                "https://ossci-datasets.s3.amazonaws.com/mnist/",
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            ),
        ),
        Spec(
            name="fashion-mnist",
            folders=("fashion-mnist", "FashionMNIST", "FashionMNIST/raw"),
            train=_idx("train"),
            test=_idx("t10k"),
            rows=(60_000, 10_000),
            mean=(0.2860,),
            std=(0.3530,),
            downloads=_idx_downloads(
                "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            ),
        ),
        Spec(
            name="cifar-10",
            folders=("cifar-10-batches-bin",),
            train=(tuple(_CIFAR_FILES[:5]),),
            test=(("test_batch.bin",),),
            rows=(50_000, 10_000),
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            downloads=(
                Download(
                    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                    members=tuple((f"cifar-10-batches-bin/{name}", name) for name in _CIFAR_FILES),
                ),
            ),
        ),
        Spec(
            name="sst-2",
            folders=("SST-2", "sst-2"),
            train=(("train.tsv",),),
            test=(("dev.tsv",),),
            rows=(67_349, 872),
            classes=2,
            downloads=(
                Download(
                    "https://dl.fbaipublicfiles.com/glue/data/SST-2.zip",
                    "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa",
                    members=(("SST-2/train.tsv", "train.tsv"), ("SST-2/dev.tsv", "dev.tsv")),
                ),
            ),
        ),
        Spec(
            name="tinyshakespeare",
            folders=("tinyshakespeare",),
            train=(("input.txt",),),
            test=(("input.txt",),),
            rows=(1_115_394, 1_115_394),
            classes=0,
            downloads=(
                Download(
                    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
                ),
            ),
        ),
        Spec(
            name="digits",
            folders=(),
            train=(),
            test=(),
            rows=(1_437, 360),
            mean=(0.3053,),  # of all 1,797 images
            std=(0.3760,),
        ),
    )
}

_ALIASES = {"fashion": "fashion-mnist", "fmnist": "fashion-mnist", "cifar10": "cifar-10", "sst2": "sst-2"}


def spec_of(name: str) -> Spec:
    """The entry of a data set; small letters and capitals, "_" and "-" count as the same.

    Raises:
        DataError: If there is none of that name; the text lists the names and the nearest one.
    """
    key = str(name).lower().replace("_", "-")
    key = _ALIASES.get(key, key)
    if key in CATALOG:
        return CATALOG[key]
    import difflib

    near = difflib.get_close_matches(key, [*CATALOG, *_ALIASES], n=1)
    hint = f"; did you mean {_ALIASES.get(near[0], near[0])!r}?" if near else ""
    raise DataError(f"no data set named {name!r}; there are {', '.join(CATALOG)}{hint}")
