"""Which measure of quality ranks the approximations as the further training does."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from scipy.stats import spearmanr

from experiments.comparing.measure import DampedResult, OperatorResult

# Fewer approximations than that have no ranking worth the name.
_FEWEST = 4


@dataclass(frozen=True)
class Prediction:
    """How well a measure ranks the approximations at one point.

    Args:
        training: Which training.
        step: The training step.
        damping: λ.
        measure: The measure.
        correlation: Spearman's rank correlation of the measure, the better the larger, with the
            negative loss after some further steps.
        operators: How many approximations were ranked.
    """

    training: str
    step: int
    damping: float
    measure: str
    correlation: float
    operators: int


def predictions(results: Sequence[OperatorResult]) -> Iterator[Prediction]:
    """Yield how well each measure predicts the loss that training continued to.

    Args:
        results: All results; nothing is yielded where no training was continued.
    """
    points = dict.fromkeys((result.trajectory, result.step) for result in results)
    for trajectory, step in points:
        here = [r for r in results if (r.trajectory, r.step) == (trajectory, step)]
        for position, damped in enumerate(here[0].damped):
            losses = [result.damped[position].continued_loss for result in here]
            scores = [_scores(result, result.damped[position]) for result in here]
            for measure in scores[0]:
                pairs = [(own[measure], -loss) for own, loss in zip(scores, losses, strict=True)]
                known = [pair for pair in pairs if not any(map(math.isnan, pair))]
                differ = all(len(set(side)) > 1 for side in zip(*known, strict=True))
                if len(known) >= _FEWEST and differ:
                    yield Prediction(
                        trajectory,
                        step,
                        damped.damping,
                        measure,
                        float(spearmanr(*zip(*known, strict=True)).statistic),
                        len(known),
                    )


def _scores(result: OperatorResult, damped: DampedResult) -> dict[str, float]:
    """Return every measure of one approximation, the better the larger."""
    matrices, inverse = result.matrices, damped.inverse
    unknown = math.nan
    condition = inverse.condition_number
    return {
        "decrease": inverse.decrease_fraction,
        "step_cosine": inverse.step_cosine,
        "condition": -condition if math.isfinite(condition) else unknown,
        "cg_iterations": -inverse.cg_iterations,
        "cosine": matrices.whole.cosine if matrices else unknown,
        "error": -matrices.whole.error if matrices else unknown,
        "block_cosine": matrices.blocks.cosine if matrices else unknown,
        "block_error": -matrices.blocks.error if matrices else unknown,
    }


def medians(found: Sequence[Prediction]) -> Iterator[tuple[float, str, dict[int, float]]]:
    """Yield damping, measure, and the median correlation over the trainings by step.

    Args:
        found: The predictions.
    """
    for damping, measure in dict.fromkeys((p.damping, p.measure) for p in found):
        own = [p for p in found if (p.damping, p.measure) == (damping, measure)]
        steps = sorted({p.step for p in own})
        yield (
            damping,
            measure,
            {s: statistics.median(p.correlation for p in own if p.step == s) for s in steps},
        )
