"""What a model says of itself: `card.json` of its run or model folder."""

from pathlib import Path
from typing import Any

from groundup.core.files import read_json

PLAIN: dict[str, Any] = {"title": "", "lines": [], "questions": []}


def read_card(path: Path, folder: Path) -> dict[str, Any]:
    """Return the card of a run or model folder; without one, the folder's name."""
    for place in (path, folder, *folder.parents[:2]):
        if (place / "card.json").is_file():
            return PLAIN | read_json(place / "card.json")
    return PLAIN | {"title": f"model {folder}"}
