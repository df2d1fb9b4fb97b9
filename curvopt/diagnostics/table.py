"""A tidy table: one row a measurement, one column a variable."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from curvopt._errors import MissingExtraError


class Table:
    """Columns as numpy arrays, rows in the order of the measurements; a column that a row lacks, or holds None in, is NaN there.

    Args:
        rows: one dict a row, of numbers and words.
        times: names of columns that hold measured times: everything else repeats bit for bit.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], times: Iterable[str] = ()) -> None:
        self._rows = [dict(row) for row in rows]
        self.columns: tuple[str, ...] = tuple(dict.fromkeys(name for row in self._rows for name in row))
        self.times: tuple[str, ...] = tuple(name for name in times if name in self.columns)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, column: str) -> np.ndarray:
        """The column as an array: numbers as int64 or float64, words as objects.

        Raises:
            KeyError: there is no such column; the text lists those that there are.
        """
        if column not in self.columns:
            raise KeyError(f"there is no column {column!r}; columns: {', '.join(self.columns)}")
        values = [math.nan if (v := row.get(column)) is None else v for row in self._rows]
        if any(isinstance(v, str) for v in values):
            return np.array(values, dtype=object)
        return np.array(values)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows as dicts."""
        return iter(self._rows)

    def arrays(self) -> dict[str, np.ndarray]:
        """All columns."""
        return {name: self[name] for name in self.columns}

    def to_pandas(self) -> Any:
        """The same as a ``pandas.DataFrame``.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError('to_pandas() needs pandas: pip install "curvopt-torch[plots]"') from error
        return pandas.DataFrame(self.arrays())

    def to_csv(self, path: str | Path) -> Path:
        """Write the table as CSV; floats keep every bit, NaN is an empty cell."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            for row in self._rows:
                writer.writerow([_cell(row.get(name)) for name in self.columns])
        return path

    def __repr__(self) -> str:
        return f"Table({len(self)} rows: {', '.join(self.columns)})"


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return repr(float(value)) if isinstance(value, (float, np.floating)) else str(value)
