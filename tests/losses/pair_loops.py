"""The losses as slow loops, written from their equations; every fast form is held against these."""

from __future__ import annotations

import torch
from torch import Tensor


def directed(video: Tensor, text: Tensor, relevance: Tensor | None):
    """Yield both directions: similarities and relevance with the anchors along the rows."""
    similarity = torch.stack([torch.stack([v @ t for t in text]) for v in video])
    yield similarity, relevance
    yield similarity.T, None if relevance is None else relevance.T


def mean_over_triples(video: Tensor, text: Tensor, relevance: Tensor, penalty) -> Tensor:
    """Mean of penalty(S_ij, S_ik, c_ij, c_ik), j the partner of i, over k != i, both directions."""
    terms = []
    for S, c in directed(video, text, relevance):
        for i in range(len(S)):
            terms += [penalty(S[i, i], S[i, k], c[i, i], c[i, k]) for k in range(len(S)) if k != i]
    return sum(terms) / len(terms)


def max_margin(video, text, relevance, margin=0.2):
    return mean_over_triples(
        video, text, relevance, lambda Sij, Sik, cij, cik: (margin - Sij + Sik).clamp(min=0)
    )


def adaptive_max_margin(video, text, relevance, margin=0.4):
    return mean_over_triples(
        video, text, relevance, lambda Sij, Sik, cij, cik: (cij * margin - Sij + Sik).clamp(min=0)
    )


def sms(video, text, relevance, margin=0.6, relaxation=0.1, threshold=0.1):
    """Eq. 16."""

    def penalty(Sij, Sik, cij, cik):
        difference = cij - cik
        if difference >= threshold:
            return (difference * margin - Sij + Sik).clamp(min=0)
        if difference <= -threshold:
            return (-difference * margin + Sij - Sik).clamp(min=0)
        return ((Sij - Sik).abs() - relaxation).clamp(min=0)

    return mean_over_triples(video, text, relevance, penalty)


def hard_label_sms(video, text, relevance, margin=0.3, relaxation=0.1):
    """Eq. 17; `relevance` is 0 or 1 and 1 on the diagonal."""

    def penalty(Sij, Sik, cij, cik):
        if cij - cik == 1:
            return (margin - Sij + Sik).clamp(min=0)
        return ((Sij - Sik).abs() - relaxation).clamp(min=0)

    return mean_over_triples(video, text, relevance, penalty)


def info_nce(video, text, temperature=0.05):
    terms = []
    for S, _ in directed(video, text, None):
        for i in range(len(S)):
            exponentials = (S[i] / temperature).exp()
            terms.append(-(exponentials[i] / exponentials.sum()).log())
    return sum(terms) / len(terms)


def sms_and_info_nce(video, text, relevance, weight=0.3, temperature=0.2):
    return sms(video, text, relevance) + weight * info_nce(video, text, temperature)


def siglip(video, text, log_scale, bias):
    """-1/B sum_ij log sigmoid(z_ij (t x_i . y_j + b))."""
    total = 0
    for i in range(len(video)):
        for j in range(len(text)):
            logit = log_scale.exp() * (video[i] @ text[j]) + bias
            total -= (1 / (1 + (-logit if i == j else logit).exp())).log()
    return total.squeeze() / len(video)


def ego_nce(video, text, verb_sets: list[set], noun_sets: list[set], temperature=0.05):
    terms = []
    for S, _ in directed(video, text, None):
        for i in range(len(S)):
            positives = [
                j
                for j in range(len(S))
                if j == i or (verb_sets[i] & verb_sets[j] and noun_sets[i] & noun_sets[j])
            ]
            exponentials = (S[i] / temperature).exp()
            terms.append(-(exponentials[positives].sum() / exponentials.sum()).log())
    return sum(terms) / len(terms)


def ego_nce_plus_plus(video, text, negatives, noun_sets: list[set], temperature=0.05):
    """The docstring of `EgoNCEPlusPlusLoss`; `negatives[i]` are as many as caption i has."""
    total = 0
    for i in range(len(video)):
        to_texts = [(video[i] @ t / temperature).exp() for t in text]
        to_false = [(video[i] @ n / temperature).exp() for n in negatives[i]]
        total -= (to_texts[i] / (sum(to_texts) + sum(to_false))).log()
        to_videos = [(text[i] @ v / temperature).exp() for v in video]
        positives = [e for j, e in enumerate(to_videos) if j == i or noun_sets[i] & noun_sets[j]]
        total -= (sum(positives) / sum(to_videos)).log()
    return total / len(video)
