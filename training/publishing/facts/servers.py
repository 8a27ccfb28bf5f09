"""What the card gives to embedding servers, quoted for a command line."""

from __future__ import annotations

from hub_cards.markdown import shell_json, shell_word
from training.publishing.record import ModelRelease

_TEXT = "Where do giant pandas live?"


def server_facts(release: ModelRelease, repository: str, width: int | None) -> dict[str, str]:
    """Words of the commands.

    Args:
        release: The model.
        repository: What the servers load.
        width: Dimensions asked for; None for all.
    """
    prompt = release.prompts.get("query", "")
    cut = {"dimensions": width} if width else {}
    # llama.cpp reads these two escapes itself.
    escaped = (prompt + _TEXT).replace("\\", "\\\\").replace("\n", "\\n")
    return {
        "repository": shell_word(repository),
        "tei": shell_json({"inputs": _TEXT, **({"prompt_name": "query"} if prompt else {}), **cut}),
        "vllm": shell_json({"model": repository, "input": prompt + _TEXT, **cut}),
        "vllm_config": shell_json({"is_matryoshka": True, "matryoshka_dimensions": list(release.dimensions)}),
        "llama": shell_word(escaped),
    }
