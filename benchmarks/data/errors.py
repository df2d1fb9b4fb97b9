"""The named errors of the data layer; each text says which file, what was wrong and what to do."""

from __future__ import annotations

from curvopt._errors import CurvoptError

__all__ = ["DataError", "DataFormatError", "DataMissingError", "FetchError"]


class DataError(CurvoptError):
    """Base of what loading or fetching a data set can raise."""


class DataMissingError(DataError, FileNotFoundError):
    """A data set is in none of the places looked at; the text names the file, CURVOPT_DATA and the fetch command."""


class DataFormatError(DataError, ValueError):
    """A file is there but truncated, corrupt or of another format; the text names it and what was wrong."""


class FetchError(DataError, ConnectionError):
    """A download failed, took too long or had the wrong checksum; what was in the cache before is untouched."""
