"""Render the example cards again from a packed model: ``python hub_cards/update_examples.py PACKED``."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

# Run as a script from a checkout: the recipe is not an installed package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.common.command import require, run_command

if __name__ == "__main__":
    require("jinja2", "publish")

from training.common.errors import UserError
from training.common.outputs import check_output, new_folder, write_whole
from training.publishing.card import CARD, model_card
from training.publishing.evaluation import FIGURES
from training.publishing.hub.checkpoints import CheckpointFacts, checkpoint_card
from training.publishing.record import ModelRelease, load_release

EXAMPLES = Path(__file__).resolve().parent / "examples"
CHECKPOINT = "checkpoint.md"
_ORGANISATION = "example-org"


def main(words: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="update_examples.py", description=__doc__)
    parser.add_argument("packed", type=Path, help="folder that publish.py pack wrote")
    arguments = parser.parse_args(words)
    return run_command(lambda: update_examples(arguments.packed, EXAMPLES))


def update_examples(packed: Path, output: Path) -> None:
    """Write the card of a packed model with its figures, and the card of the checkpoint of its last step."""
    release = load_release(packed)
    repository = f"{_ORGANISATION}/{release.name}"
    card, checkpoint = model_card(packed, repository), checkpoint_card(_last_checkpoint(release, repository))
    check_output(output, [packed], [CARD, CHECKPOINT, FIGURES, ".*"], option="folder of examples")
    output.mkdir(parents=True, exist_ok=True)
    with new_folder(output / FIGURES) as figures:
        # The card shows these; SVG copies would be as large again.
        shutil.copytree(packed / FIGURES, figures, ignore=shutil.ignore_patterns("*.svg"), dirs_exist_ok=True)
    write_whole(output / CARD, card)
    write_whole(output / CHECKPOINT, checkpoint)


def _last_checkpoint(release: ModelRelease, repository: str) -> CheckpointFacts:
    stage = release.stages[-1] if release.stages else None
    if stage is None or stage.steps is None:
        raise UserError(f"{release.name}: its record knows no step of its last stage; pack a run that trained")
    return CheckpointFacts(
        repository=repository,
        revision=f"{stage.name}-step-{stage.steps:06d}",
        stage=stage.name,
        step=stage.steps,
        dimensions=release.dimensions,
        max_steps=stage.steps,
        epoch=stage.epochs,
        metrics=stage.metrics,
        parameters=release.parameters,
        prompts=release.prompts,
        start=stage.start,
        teacher=stage.teacher,
        languages=release.languages,
        finished=True,
    )


if __name__ == "__main__":
    raise SystemExit(main())
