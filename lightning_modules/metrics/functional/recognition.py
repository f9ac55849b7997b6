"""Action recognition: top-k accuracy of actions, and of verbs and nouns by marginalisation."""

from __future__ import annotations

from torch import Tensor

from lightning_modules.metrics.functional.ranking import rank_of, refuse_nan


def marginal_probabilities(logits: Tensor, class_of_action: Tensor, num_classes: int) -> Tensor:
    """Probabilities of verbs (or nouns): sums of the softmax over the actions that have them.

    Args:
        logits: (N, actions).
        class_of_action: (actions,) the verb (or noun) class of each action.
        num_classes: Number of verb (or noun) classes.

    Returns:
        (N, num_classes) float64; 0 for a class that no action has.

    Raises:
        ValueError: Shapes do not match or a class id is out of range.
    """
    if logits.ndim != 2 or class_of_action.shape != logits.shape[1:]:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and class_of_action "
            f"{tuple(class_of_action.shape)}; they must be (N, actions) and (actions,)"
        )
    if not (class_of_action.min() >= 0 and class_of_action.max() < num_classes):
        raise ValueError(
            f"class ids lie in [{class_of_action.min()}, {class_of_action.max()}]; with "
            f"{num_classes} classes they must lie in [0, {num_classes})"
        )
    probabilities = logits.double().softmax(dim=1)
    zeros = probabilities.new_zeros(len(logits), num_classes)
    return zeros.index_add_(1, class_of_action, probabilities)


def in_top_k(scores: Tensor, target: Tensor, k: int) -> Tensor:
    """Whether the target is among the k best classes; ties: the smaller class first.

    Args:
        scores: (N, C); no NaN.
        target: (N,) class ids.
        k: At least 1.

    Returns:
        (N,) bool.
    """
    refuse_nan(scores, "scores")
    return rank_of(scores, target) <= k


def action_hits(
    logits: Tensor, action: Tensor, verb_of_action: Tensor, noun_of_action: Tensor
) -> dict[str, Tensor]:
    """Top-1 and top-5 hits of actions, verbs and nouns (EK-100 action recognition).

    Verb and noun probabilities are marginals of the action probabilities.

    Args:
        logits: (N, actions), scaled as the softmax wants them: a temperature changes the marginals.
        action: (N,) the right actions.
        verb_of_action: (actions,) verb class of each action.
        noun_of_action: (actions,) noun class of each action.

    Returns:
        (N,) bool each: `action_top1`, `action_top5`, `verb_top1`, ..., `noun_top5`.

    Raises:
        ValueError: Shapes do not match, or a logit is NaN.
    """
    refuse_nan(logits, "logits")
    scores = {"action": (logits, action)}
    for name, classes in (("verb", verb_of_action), ("noun", noun_of_action)):
        marginal = marginal_probabilities(logits, classes, int(classes.max()) + 1)
        scores[name] = (marginal, classes[action])
    return {
        f"{name}_top{k}": in_top_k(values, target, k)
        for name, (values, target) in scores.items()
        for k in (1, 5)
    }
