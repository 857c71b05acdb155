"""Where the data sets of a grid lie, and where its runs keep what is theirs."""

from pathlib import Path

from benchmarks.evidence.grid import DataSet, Grid, Overrides
from hetegen_rec.config.data import Split

_SPLITS: tuple[Split, ...] = ("train", "valid", "test")


class Places:
    """The directories of a grid's runs."""

    def __init__(self, grid: Grid, out: Path, data_root: Path) -> None:
        """Looks for the data.

        Args:
            grid: whose runs.
            out: directory of the runs and their prepared data.
            data_root: where the data sets with `files` lie.
        """
        self._grid, self._out, self._data_root = grid, out, data_root
        self.missing = {n: place for n, one in grid.data_sets.items() if (place := self._missing(one))}
        """Data sets that are not there, and where they were looked for."""

    def data(self, data_set: str) -> Overrides:
        """What tells a run where the data of its data set lie."""
        here = self._out / "data" / data_set
        places = {"data.raw_dir": str(here / "raw"), "data.prepared_dir": str(here / "prepared")}
        files = self._grid.data_sets[data_set].files
        if files is not None:
            found = {f"data.{split}": f"{self._data_root / files / split}/*.parquet" for split in _SPLITS}
            places = {**places, **found, "data.source": "null"}
        return places

    def run_dir(self, data_set: str, name: str) -> str:
        """The directory of a run, by its name among those of the data set."""
        return str(self._out / "runs" / data_set / name)

    def _missing(self, data_set: DataSet) -> Path | None:
        if data_set.files is None:
            return None
        place = self._data_root / data_set.files
        return None if place.is_dir() else place
