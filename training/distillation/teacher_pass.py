"""The pass in which a teacher embeds every text of a stage, for a cache that serves all epochs and all students."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from training.common.units import operations, size
from training.config.arguments import StageArguments
from training.data.prepared import PreparedSource
from training.models.model_size import forward_flops


class TeacherPass(NamedTuple):
    """One pass over all texts; less what the cache holds already, which is not looked for.

    Attributes:
        texts: Texts of all sources.
        tokens: Their tokens.
        bytes: Of the embeddings on disk, in float16.
        flops: Operations.
        student_tokens: Tokens that the student encodes in as many operations.
    """

    texts: int
    tokens: int
    bytes: int
    flops: float
    student_tokens: float

    def described(self) -> str:
        """The pass in words."""
        return (
            f"embeds {self.texts:,} texts of {self.tokens:,} tokens once for all students, less what is there already: "
            f"{operations(self.flops)}, {size(self.bytes)} on disk"
        )


def teacher_pass(
    args: StageArguments, config: F2LLMConfig, teacher: F2LLMConfig | None, sources: Sequence[PreparedSource] | None
) -> TeacherPass | None:
    """The pass that fills a stage's cache; None without a cache, a known teacher or prepared sources.

    Args:
        args: The stage.
        config: The student's shape.
        teacher: The teacher's.
        sources: The prepared sources, if they are at hand: how many texts are distinct cannot be estimated.
    """
    if args.teacher_cache_dir is None or teacher is None or not sources:
        return None
    texts, tokens = (sum(source.description[what] for source in sources) for what in ("texts", "tokens"))
    # Texts of one length stand for all: attention is a small part of it.
    squared = tokens**2 / max(texts, 1)
    flops, own = (forward_flops(each, tokens, squared) for each in (teacher, config))
    return TeacherPass(texts, tokens, 2 * texts * teacher.hidden_size, flops, tokens * flops / own)
