"""What a stage of a recipe may say of what it publishes while it trains."""

from __future__ import annotations

from dataclasses import dataclass, field

from training.errors import UserError

__all__ = ["PublishingArguments"]


@dataclass
class PublishingArguments:
    """The keys of a stage that are about the Hub."""

    push_checkpoints: str | None = field(
        default=None,
        metadata={
            "help": "Repository on the Hub, ORG/NAME, that gets every checkpoint as a revision, in the background; "
            "what cannot be uploaded waits in the run's folder."
        },
    )

    def _check_publishing(self) -> None:
        if self.push_checkpoints is None:
            return
        from training.publishing.names import check_repository

        try:
            check_repository(self.push_checkpoints)
        except UserError as error:
            raise UserError(f"key 'push_checkpoints': {str(error).removeprefix('--repo ')}") from None
        if self.prunes:
            raise UserError("key 'push_checkpoints' has no effect in a stage that cuts a model; it saves none")
        if self.save_strategy == "no":
            raise UserError("key 'push_checkpoints' has no effect without checkpoints; give 'save_strategy'")
