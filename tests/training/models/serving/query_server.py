"""Asks a server for embeddings with the openai client, in the server's environment; imports nothing of ours."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import openai


def main(url: str, folder: Path) -> None:
    client = openai.OpenAI(base_url=url, api_key="none", timeout=60, max_retries=0)
    answers = {}
    for name, request in json.loads((folder / "requests.json").read_text(encoding="utf-8")).items():
        answer = client.embeddings.create(model="f2llm", **request)
        answers[name] = [each.embedding for each in answer.data]
    (folder / "answers.json").write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
