"""A metrics log: one JSON object a line, appended while a stage runs, cut back on resume."""

import json
from pathlib import Path
from typing import Any

from groundup.core.files import storage_errors, write_text


class MetricsLog:
    """Append-only `metrics.jsonl`; every row has a `step`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, *, step: int, **values: Any) -> None:
        """Append one row."""
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as handle:
                handle.write(json.dumps({"step": step, **values}) + "\n")

    def truncate_after(self, step: int) -> list[dict[str, Any]]:
        """Drop rows later than `step`: a resumed run writes them again; return the others."""
        if not self.path.exists():
            return []
        rows = [row for row in self.read(self.path) if row["step"] <= step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        return rows

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """Return all rows; a last line cut off by a crash is left out."""
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows
