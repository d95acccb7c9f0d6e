"""Paths that are no local files: what they stand for, and how their files are opened.

hf://datasets/ORG/NAME/...            a data set of the Hugging Face hub (`hub.py`)
cc:CC-MAIN-2024-22?files=2, cc:ROWS   files or single pages of Common Crawl (`crawl.py`)
https://HOST/PATH                     one file
"""

from pathlib import Path

from groundup.data import crawl, hub
from groundup.data.found import Found, Options
from groundup.data.remote import RemoteFile, size_of

WEB = ("https://", "http://")


def is_remote(path: str) -> bool:
    """Return whether a path that was given stands for files elsewhere."""
    return path.startswith((hub.SCHEME, crawl.SCHEME, "hf://", *WEB))


def find_remote(path: str) -> list[Found]:
    """Return the files that such a path stands for; this is where the network is first asked."""
    if path.startswith(WEB):
        return [Found(path, path, size_of(path, hub.headers_for(path)))]
    scheme, finder = (
        (crawl.SCHEME, crawl.find_files)
        if path.startswith(crawl.SCHEME)
        else (hub.SCHEME, hub.find_files)
    )
    rest, _, query = path.removeprefix(scheme).partition("?")
    return finder(path, rest, Options(path, query))


def open_place(place: str) -> Path | RemoteFile:
    """Return the file at a place, local or remote."""
    if place.startswith(WEB):
        return RemoteFile(place, hub.headers_for(place))
    return Path(place)
