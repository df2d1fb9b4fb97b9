"""Real data sets in their public formats, from a local folder or the user's cache; nothing downloads by itself."""

from .datasets import CharData as CharData
from .datasets import Dataset as Dataset
from .datasets import ImageData as ImageData
from .datasets import SentenceData as SentenceData
from .errors import DataError as DataError
from .errors import DataFormatError as DataFormatError
from .errors import DataMissingError as DataMissingError
from .errors import FetchError as FetchError
from .fetch import fetch as fetch
from .loaders import load as load
from .loaders import load_chars as load_chars
from .loaders import load_images as load_images
from .loaders import load_sentences as load_sentences
from .prepare import Vocabulary as Vocabulary
from .prepare import channel_statistics as channel_statistics
from .prepare import char_windows as char_windows
from .prepare import standardize as standardize
from .store import available as available
from .store import cache_folder as cache_folder

__all__ = [
    "CharData",
    "DataError",
    "DataFormatError",
    "DataMissingError",
    "Dataset",
    "FetchError",
    "ImageData",
    "SentenceData",
    "Vocabulary",
    "available",
    "cache_folder",
    "channel_statistics",
    "char_windows",
    "fetch",
    "load",
    "load_chars",
    "load_images",
    "load_sentences",
    "standardize",
]
