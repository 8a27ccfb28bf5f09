"""What a stage of a recipe may say of what it publishes while it trains."""

from __future__ import annotations

from dataclasses import dataclass, field

from training.common.errors import UserError


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
        from training.common.hub_names import check_repository

        try:
            check_repository(self.push_checkpoints)
        except UserError as error:
            raise UserError(f"key 'push_checkpoints': {str(error).removeprefix('--repo ')}") from None
        # It may stand for all stages of a recipe; one that cuts a model has no checkpoints.
        if self.prunes:
            return
        if self.lora:
            raise UserError(
                "key 'push_checkpoints': checkpoints of a stage with 'lora' hold an adapter alone, and no model that a "
                "revision could be; leave it out, and merge and publish the finished adapter"
            )
        if self.save_strategy == "no":
            raise UserError(
                "key 'push_checkpoints' has no effect without checkpoints; give 'save_strategy', as in "
                "'save_strategy: epoch'"
            )
