"""Data sets of the Hugging Face hub, by id: which of a repository's files a path stands for.

    hf://datasets/ORG/NAME[@REVISION][/FOLDER, FILE or PATTERN][?name=CONFIG&split=train&files=3]

as pandas, DuckDB and HfFileSystem write it; `name` and `split` as `load_dataset` has them. Configs
and their splits stand in the data set's card. Honours HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

import yaml

from groundup.core.errors import DataError, closest
from groundup.core.progress import say
from groundup.data.found import Found, Options, choose_files
from groundup.data.remote import read_whole

SCHEME = "hf://datasets/"
PATH = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[^/]+))?(?:/(?P<inside>.+))?")
DATA_SUFFIXES = frozenset((".parquet", ".arrow", ".jsonl", ".ndjson", ".json", ".txt", ".warc"))
PACKED_SUFFIXES = frozenset((".gz", ".zst", ".bz2", ".xz"))
# keywords in names of files and folders, by which `load_dataset` tells splits without a card
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
REDPAJAMA = "togethercomputer/RedPajama-Data-V2"
REDPAJAMA_FILES = "https://data.together.xyz/redpajama-data-v2/v1.0.0"
REDPAJAMA_LANGUAGES = ("en", "de", "fr", "es", "it")


def find_files(path: str, rest: str, options: Options) -> list[Found]:
    """Return the files that a path on the hub stands for; `rest` is what follows the scheme."""
    match = PATH.fullmatch(rest.rstrip("/"))
    if match is None:
        raise DataError(f"{path} is not of the form {SCHEME}ORG/NAME/FOLDER")
    repo, revision, inside = match["repo"], match["revision"], match["inside"]
    if repo == REDPAJAMA and not inside and options.get("name") != "sample":
        return redpajama_files(path, options)
    options.allow("name", "split", "files", "seed")
    listing = Listing(repo, revision)
    if repo == REDPAJAMA and not inside:
        inside, chosen = "sample/documents", "the sample"
    elif inside and (options.get("name") or options.get("split")):
        raise DataError(f"{path}: give a folder, or name and split, not both")
    else:
        chosen = inside or ""
    if inside:
        names = inside_of(listing.files, inside)
    else:
        names, chosen = of_config(listing, path, options.get("name"), options.get("split"))
    if not names:
        there = ", ".join(sorted({name.split("/")[0] for name in listing.files})[:12]) or "nothing"
        raise DataError(f"{path}: no data files there; the data set has {there}")
    names = choose_files(names, options)
    size = sum(listing.files[name] for name in names)
    say(
        f"{repo} at {listing.revision[:10]}: {len(names):,} files of {chosen}, {size / 1e6:,.1f} MB"
    )
    return [Found(listing.place(name), f"{repo}/{name}", listing.files[name]) for name in names]


class Listing:
    """The files of a data set with their sizes, at one revision, which does not move."""

    def __init__(self, repo: str, revision: str | None) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
        from huggingface_hub.hf_api import RepoFile

        self.repo = repo
        api = HfApi()
        try:
            info = api.dataset_info(repo, revision=revision)
            self.revision = str(info.sha)
            entries = list(
                api.list_repo_tree(
                    repo, repo_type="dataset", revision=self.revision, recursive=True
                )
            )
        except (HfHubHTTPError, HFValidationError) as err:
            raise DataError(
                f"the hub gives no data set {repo}: {first_words(err)}. Check the name; a private "
                "or gated data set needs HF_TOKEN"
            ) from err
        except Exception as err:  # what breaks on the way has no common class in the client
            raise DataError(
                f"the hub cannot be reached for {repo} ({first_words(err)}): check the network, or "
                "give the folder of a copy"
            ) from err
        self.files = {
            entry.path: int(entry.size) for entry in entries if isinstance(entry, RepoFile)
        }

    def place(self, name: str) -> str:
        """Return the address of a file."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo, name, repo_type="dataset", revision=self.revision)

    def card(self) -> dict[str, Any]:
        """Return what the head of the data set's card says."""
        if "README.md" not in self.files:
            return {}
        return card_head(read_whole(self.place("README.md"), headers_for(self.place("README.md"))))


def first_words(err: BaseException) -> str:
    """Return an error's first words in one line."""
    cause = err.__cause__ or err
    return next((line.strip() for line in str(cause).splitlines() if line.strip()), repr(cause))


def card_head(content: bytes) -> dict[str, Any]:
    """Return the YAML between the first two lines of dashes of a data set's card."""
    parts = re.split(rb"^---\s*$", content, maxsplit=2, flags=re.M)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        head = yaml.safe_load(parts[1])
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}
    return head if isinstance(head, dict) else {}


def headers_for(url: str) -> dict[str, str]:
    """Return the authorisation for an address, if it is the hub's and there is a token."""
    from huggingface_hub import get_token
    from huggingface_hub.constants import ENDPOINT

    token = get_token() if url.startswith(ENDPOINT + "/") else None
    return {"Authorization": f"Bearer {token}"} if token else {}


def is_data(name: str) -> bool:
    """Return whether a file of a repository holds data, by its name."""
    path = PurePosixPath(name)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in PACKED_SUFFIXES:
        suffixes.pop()
    hidden = any(part.startswith((".", "__")) for part in path.parts)
    about = path.name in ("dataset_infos.json", "dataset_info.json", "state.json", "README.txt")
    return bool(suffixes) and suffixes[-1] in DATA_SUFFIXES and not hidden and not about


def inside_of(files: Mapping[str, int], inside: str) -> list[str]:
    """Return the data files of a folder, those that fit a pattern, or one file."""
    if inside in files:
        return [inside]
    if any(mark in inside for mark in "*?["):
        return sorted(name for name in files if matches(name, inside))
    return sorted(name for name in files if name.startswith(inside + "/") and is_data(name))


def matches(name: str, pattern: str) -> bool:
    """Return whether a name fits a pattern, where * stays inside a folder and ** does not."""
    if "**" in pattern:
        return fnmatchcase(name, pattern.replace("**/", "*").replace("**", "*"))
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def of_config(
    listing: Listing, path: str, name: str | None, split: str | None
) -> tuple[list[str], str]:
    """Return the files of a config's split, and the choice in words."""
    configs = {
        config["config_name"]: dict(splits_of(config.get("data_files")))
        for config in listing.card().get("configs") or ()
        if isinstance(config, dict) and config.get("config_name") and config.get("data_files")
    }
    if not configs:
        if name:
            raise DataError(f"{path}: its card names no configs; give a folder instead")
        files = sorted(file for file in listing.files if is_data(file))
        wanted = split or "train"
        found = by_words(files, wanted)
        return found, f"split {wanted}"
    if name is None:
        if len(configs) > 1 and "default" not in configs:
            raise DataError(f"{path}: say which of its configs, ?name={'|'.join(configs)}")
        name = "default" if "default" in configs else next(iter(configs))
    if name not in configs:
        raise DataError(f"{path}: there is no config {name!r}{closest(name, configs)}")
    splits = configs[name]
    wanted = split or ("train" if "train" in splits else next(iter(splits)))
    if wanted not in splits:
        raise DataError(f"{path}: config {name} has no split {wanted!r}: {', '.join(splits)}")
    files = [
        file
        for file in sorted(listing.files)
        if any(matches(file, pattern) for pattern in splits[wanted])
    ]
    return files, f"config {name}, split {wanted}"


def splits_of(data_files: Any) -> Iterator[tuple[str, list[str]]]:
    """Yield (split, patterns) of a config's data files, in any of the forms a card may use."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    plain = [entry for entry in entries if isinstance(entry, str)]
    if plain:
        yield "train", plain
    for entry in entries:
        if isinstance(entry, dict) and "path" in entry:
            paths = entry["path"]
            yield str(entry.get("split", "train")), [paths] if isinstance(paths, str) else paths


def by_words(files: Sequence[str], split: str) -> list[str]:
    """Return the files of a split by the words in their names; those without any are train's."""
    words = {word: name for name, several in SPLIT_WORDS.items() for word in several}
    told = {}
    for file in files:
        parts = re.split(r"[^a-z]+", file.lower())
        told[file] = next((words[part] for part in parts if part in words), None)
    if split == "train" and split not in told.values():
        return [file for file in files if told[file] is None]
    return [file for file in files if told[file] == split]


def redpajama_files(path: str, options: Options) -> list[Found]:
    """Return files of RedPajama-V2, which lie outside the hub, by snapshot and language."""
    options.allow("name", "snapshots", "languages", "partition", "files", "seed")
    snapshots = options.get("snapshots")
    if not snapshots:
        raise DataError(
            f"{path}: say which part: '?name=sample', or as load_dataset has it "
            "'?snapshots=2023-06,2022-49&languages=en&partition=head_middle'"
        )
    partition = options.get("partition") or "head_middle"
    base = options.base("REDPAJAMA_ENDPOINT", REDPAJAMA_FILES)
    names = []
    for language in (options.get("languages") or "en").split(","):
        if language not in REDPAJAMA_LANGUAGES:
            known = ", ".join(REDPAJAMA_LANGUAGES)
            raise DataError(f"{path}: there is no language {language!r}, only {known}")
        for snapshot in snapshots.split(","):
            listing = read_whole(f"{base}/listings/{language}-{snapshot}-{partition}.txt")
            names += [line.strip() for line in listing.decode().splitlines() if line.strip()]
    names = choose_files(names, options)
    say(f"RedPajama-V2: {len(names):,} files of {snapshots} ({partition})")
    return [
        Found(f"{base}/documents/{name}.json.gz", f"{REDPAJAMA}/documents/{name}.json.gz", 1 << 28)
        for name in names
    ]
