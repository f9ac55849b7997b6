"""Multiple choice: EgoMCQ."""

from __future__ import annotations

from torch import Tensor

from lightning_modules.metrics.functional.ranking import refuse_nan

# EgoMCQ's `types`. Several public evaluators print the two names swapped.
INTER_VIDEO, INTRA_VIDEO = 1, 2


def choice_correct(similarity: Tensor, answer: Tensor) -> Tensor:
    """Whether the most similar choice is the answer; the first of equally similar ones counts.

    Args:
        similarity: (Q, choices) similarity of each query to its own choices.
        answer: (Q,) the right choice, 0-based.

    Returns:
        (Q,) bool.

    Raises:
        ValueError: Shapes do not match, a similarity is NaN or an answer is no choice.
    """
    if similarity.ndim != 2 or answer.shape != similarity.shape[:1]:
        raise ValueError(
            f"similarity has shape {tuple(similarity.shape)} and answer {tuple(answer.shape)}; "
            "they must be (Q, choices) and (Q,)"
        )
    refuse_nan(similarity, "similarity")
    if len(answer) and not (answer.min() >= 0 and answer.max() < similarity.shape[1]):
        raise ValueError(
            f"answers lie in [{answer.min()}, {answer.max()}]; with {similarity.shape[1]} choices "
            "they must lie in [0, choices)"
        )
    return similarity.argmax(dim=1) == answer  # the first of several maxima


def egomcq_accuracy(correct: Tensor, types: Tensor) -> dict[str, float]:
    """Accuracy of EgoMCQ by type of question.

    Args:
        correct: (Q,) bool, see `choice_correct`.
        types: (Q,) EgoMCQ's `types`: 1 = inter-video (the choices come from different videos),
            2 = intra-video (all from one video).

    Returns:
        `inter` and `intra` as fractions (NaN without a question of the type), and their numbers of
        questions `num_inter`, `num_intra`.

    Raises:
        ValueError: Another type than 1 and 2 occurs.
    """
    known = (types == INTER_VIDEO) | (types == INTRA_VIDEO)
    if not known.all():
        raise ValueError(
            f"question types {types[~known].unique().tolist()} occur; EgoMCQ has 1 (inter-video) "
            "and 2 (intra-video)"
        )
    result = {}
    for name, kind in (("inter", INTER_VIDEO), ("intra", INTRA_VIDEO)):
        chosen = correct[types == kind]
        result[name] = chosen.double().mean().item()
        result[f"num_{name}"] = len(chosen)
    return result
