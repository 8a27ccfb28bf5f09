"""What an upload would do, for those who want to look first: files, a card to read, and a summary that comes last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import mkdtemp

from huggingface_hub import RepoCard

from training.common.content import Content
from training.common.run_folder import write_whole
from training.publishing.hub.destination import Destination

CARD = "README.md"
# The checks of a packed folder, as a summary tells them.
CHECKED = "no fault; embeddings were not computed (`publish.py verify` does)"
UNCHECKED = "not made (--no-verify)"


def text_of(files: Mapping[str, Content]) -> str:
    """The card among the files of an upload."""
    return bytes(files[CARD].payload).decode()


def file_list(files: Mapping[str, Content]) -> str:
    """The files of an upload with their sizes, a line each."""
    sizes = {path: content.size for path, content in sorted(files.items())}
    width = max(len(f"{size:,}") for size in sizes.values())
    return "".join(f"{size:>{width},}  {path}\n" for path, size in sizes.items())


def write_card(folder: Path, text: str) -> Path:
    """Writes a card beside a folder, or among temporary files where nothing can be written there; returns its path."""
    path = folder.absolute().with_name(f"{folder.absolute().name}.card.md")
    try:
        write_whole(path, text)
    except OSError:
        path = Path(mkdtemp(prefix="f2llm-card-"), path.name)
        write_whole(path, text)
    return path


def card_licence(text: str) -> str:
    """The licences that the header of a card names."""
    data = RepoCard(text, ignore_metadata_errors=True).data.to_dict()
    named = data.get("license")
    names = ", ".join(map(str, named)) if isinstance(named, list) else str(named or "not stated")
    return f"{names} ({data['license_name']})" if data.get("license_name") else names


def visibility(private: bool | None) -> str:
    """Who will see a repository that an upload makes."""
    kept = "a repository that is there stays as it is"
    return f"private; {kept}" if private else f"a new repository as its owner's settings say; {kept}"


def upload_rows(address: str, place: Destination, files: Mapping[str, Content]) -> list[tuple[str, str]]:
    """What a summary tells of the upload of a folder."""
    return [
        ("upload", f"{amount(files)}, to {address}, branch {place.revision}"),
        ("licence", card_licence(text_of(files))),
        ("tag", place.tag or "none"),
        ("visibility", visibility(place.private)),
    ]


def amount(files: Mapping[str, Content]) -> str:
    """How much it is."""
    return f"{sum(content.size for content in files.values()):,} bytes in {len(files)} files"


def summary(rows: Sequence[tuple[str, str]]) -> str:
    """The end of what a dry run shows: rows of a name and what is told under it."""
    width = max(len(name) for name, _ in rows)
    lines = (f"{name:<{width}}  {told}\n" for name, told in rows)
    return f"\n{''.join(lines)}Nothing was uploaded.\n"
