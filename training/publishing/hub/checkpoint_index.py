"""What the main branch of a repository of checkpoints holds: the list of its revisions, for programs and as a card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hub_cards.hub_terms import hub_languages
from hub_cards.metadata import header
from hub_cards.render import render_checkpoints_card
from training.common.errors import UserError
from training.publishing.facts.metadata import LIBRARY, PIPELINE, shared_tags
from training.publishing.hub.checkpoint_files import Revision
from training.publishing.record import RECORD

INDEX = "checkpoints.json"
_LOSSES = ("loss", "eval_loss")


class CheckpointIndex:
    """The revisions of a repository, as its main branch lists them.

    Args:
        content: Of ``checkpoints.json``; None for a repository that has none yet.

    Raises:
        UserError: If it is damaged.
    """

    def __init__(self, content: bytes | None = None) -> None:
        try:
            written = json.loads(content) if content is not None else {"stages": {}, "revisions": {}}
            self.stages: dict[str, dict[str, Any]] = written["stages"]
            self.revisions: dict[str, dict[str, Any]] = written["revisions"]
            self.languages: list[str] = written.get("languages", [])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"its {INDEX} is no list of checkpoints ({type(error).__name__}); give another repository"
            ) from None

    def objection(self, revision: Revision) -> str | None:
        """Why a revision does not belong here: another model's stage has that name. None if it does."""
        held = self.stages.get(revision.facts.stage)
        if held is None or held == _stage(revision):
            return None
        return f"holds checkpoints of another stage {revision.facts.stage!r}"

    def add(self, revision: Revision) -> None:
        """Lists a revision, or what is now known of it."""
        facts = revision.facts
        self.stages[facts.stage] = _stage(revision)
        self.languages = sorted({*self.languages, *facts.languages})
        kept = {"loss": "train_loss", "eval_loss": "eval_loss"}
        losses = {name: facts.metrics[key] for name, key in kept.items() if key in facts.metrics}
        listed = {"stage": facts.stage, "step": facts.step, "max_steps": facts.max_steps, "epoch": facts.epoch}
        self.revisions[revision.name] = {**listed, **losses}

    def files(self, repository: str) -> Mapping[str, bytes]:
        """``checkpoints.json`` and the card, by path."""
        ordered = dict(sorted(self.revisions.items(), key=lambda item: (item[1]["stage"], item[1]["step"])))
        content = {"stages": dict(sorted(self.stages.items())), "revisions": ordered, "languages": self.languages}
        return {
            INDEX: (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(),
            "README.md": self._card(repository, ordered).encode(),
        }

    def _card(self, repository: str, revisions: Mapping[str, Mapping[str, Any]]) -> str:
        languages = hub_languages(self.languages)
        metadata = ModelCardData(
            language=languages or None,
            library_name=LIBRARY,
            pipeline_tag=PIPELINE,
            tags=[*shared_tags(False, languages), "intermediate-checkpoint"],
        )
        rows = [
            [name, each["stage"], each["step"], each["max_steps"], *(_loss(each.get(key)) for key in _LOSSES)]
            for name, each in revisions.items()
        ]
        facts = {"metadata": header(metadata), "repository": repository, "rows": rows, "newest": rows[-1][0]}
        # Fails on a header that the Hub could not read.
        return ModelCard(render_checkpoints_card(facts)).content


def _loss(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def _stage(revision: Revision) -> dict[str, Any]:
    """What tells a stage from another of its name."""
    start = revision.facts.start
    return {"shape": dict(revision.shape), "start": None if start is None else asdict(start)}


def held_by_release(record: bytes, stage: str) -> str | None:
    """Why checkpoints of a stage do not belong to the finished model of a repository; None if they do."""
    try:
        stages = [each["name"] for each in json.loads(record)["stages"]]
    except (ValueError, KeyError, TypeError):
        return f"its {RECORD} is no record of a model"
    return None if stage in stages else f"holds a model that no stage {stage!r} led to"
