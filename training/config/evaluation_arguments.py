"""What a stage of a recipe may say of its evaluation, and of what depends on it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from training.common.errors import UserError

# Of what evaluations measure, these are better the greater they are. All else are losses.
_SCORES = ("accuracy", "ndcg", "recall", "mrr")
# Schedulers that follow a metric by evaluations, and take a direction of their own.
FOLLOWING_SCHEDULERS = ("reduce_lr_on_plateau", "greedy")


def greater_is_better(metric: str) -> bool:
    """Whether a model is the better, the greater a metric of its evaluation is.

    Args:
        metric: Its name, with or without ``eval_`` before it: ``loss``, ``retrieval``, ``source/NAME``,
            ``pairs_accuracy_dim64``, …
    """
    name = metric.removeprefix("eval_")
    # A source's loss, whatever the source is called.
    return not name.startswith("source/") and any(score in name for score in _SCORES)


@dataclass
class EvaluationArguments:
    """The keys of a stage that are about pairs to be found, in training and by the finished model."""

    evaluation_pairs: str | None = field(
        default=None,
        metadata={
            "help": "File (.parquet, .csv, .jsonl) with query and passage, perhaps lang and script: "
            "find the passages of each query."
        },
    )
    evaluation_candidates: str | None = field(
        default=None, metadata={"help": "File of the same kinds whose 'passage' column lists what to find them among."}
    )
    evaluation_sample: int = field(
        default=0,
        metadata={
            "help": "So many of evaluation_pairs are evaluated in training, too, at each evaluation; "
            "metric_for_best_model may be their pairs_accuracy. 0: only the finished model is evaluated, on all pairs."
        },
    )
    evaluation_sample_candidates: int = field(
        default=2000,
        metadata={"help": "Candidates of these pairs at most; their own passages are always among them."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "End the training after so many evaluations in a row that did not improve metric_for_best_model."
        },
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "What must be exceeded to count as an improvement."}
    )

    @property
    def chooses_by_pairs(self) -> bool:
        """Whether the pairs decide which model is the best."""
        return (self.metric_for_best_model or "").removeprefix("eval_").startswith("pairs_")

    def _settle_direction(self) -> None:
        """Takes the direction of the metric that is followed from what it measures.

        Raises:
            UserError: If the other direction was given.
        """
        scheduler = str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type))
        follows = scheduler in FOLLOWING_SCHEDULERS
        metric = self.metric_for_best_model or ("loss" if follows or self.load_best_model_at_end else None)
        if metric is None:
            return
        greater = greater_is_better(metric)
        better = "greater" if greater else "lower"
        if self.greater_is_better not in (None, greater):
            raise UserError(
                f"key 'greater_is_better': of {metric!r} the {better} value is better; give 'greater_is_better: "
                f"{str(greater).lower()}' or take the key out"
            )
        self.greater_is_better = greater
        if not follows:
            return
        options, mode = self._mapping("lr_scheduler_kwargs"), "max" if greater else "min"
        if options.setdefault("mode", mode) != mode:
            raise UserError(
                f"key 'lr_scheduler_kwargs': of {metric!r} the {better} value is better; give 'mode: {mode}' or take "
                "'mode' out"
            )
        self.lr_scheduler_kwargs = options

    def _check_evaluation(self) -> None:
        for key, least in (("evaluation_sample", 0), ("evaluation_sample_candidates", 1)):
            if getattr(self, key) < least:
                raise UserError(f"key {key!r} must be at least {least}, got {getattr(self, key)}")
        if self.chooses_by_pairs and not (self.evaluation_pairs and self.evaluation_sample):
            raise UserError(
                f"key 'metric_for_best_model': {self.metric_for_best_model!r} is measured on pairs; give "
                "'evaluation_pairs' and 'evaluation_sample', the number of pairs, as in 'evaluation_sample: 500'"
            )
        # Without pairs it may stand for all stages of a recipe, of which only some have pairs.
        if self.evaluation_sample and self.evaluation_pairs and self.eval_strategy == "no" and not self.prunes:
            raise UserError(
                "key 'evaluation_sample' has no effect without evaluations; give 'eval_strategy', as in "
                "'eval_strategy: epoch'"
            )
        if self.save_strategy == "best" and self.eval_strategy == "no" and not self.prunes:
            raise UserError("key 'save_strategy: best' saves nothing without evaluations; give 'eval_strategy: epoch'")
        self._check_early_stopping()

    def _check_early_stopping(self) -> None:
        threshold = self.early_stopping_threshold
        if not 0 <= threshold < math.inf:
            raise UserError(f"key 'early_stopping_threshold' must be a number from 0, got {threshold}")
        if self.early_stopping_patience is None:
            if threshold:
                raise UserError(
                    "key 'early_stopping_threshold' has no effect without 'early_stopping_patience'; give that, too, "
                    "as in 'early_stopping_patience: 5'"
                )
            return
        if self.early_stopping_patience < 1:
            raise UserError(f"key 'early_stopping_patience' must be at least 1, got {self.early_stopping_patience}")
        for key, value, missing in (
            ("metric_for_best_model", "loss", self.metric_for_best_model is None),
            ("eval_strategy", "epoch", self.eval_strategy == "no"),
        ):
            if missing:
                raise UserError(
                    f"key 'early_stopping_patience' has no effect without {key!r}; give that, too, as in "
                    f"'{key}: {value}'"
                )
