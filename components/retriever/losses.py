"""The three losses of RankGR: next-token prediction, listwise DPO, rank-head BCE (Eq. 8, 10, 11, 16, 17).

Shapes: B rows, P targets, M levels, Q predictions of the rank head, C codewords retained for each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ntp_loss(logp_BPM: Tensor, weight_BP: Tensor) -> Tensor:
    """Mean over weighted targets of -sum over levels of log p (RankGR Eq. 10).

    Args:
        logp_BPM: log-probability of each target's codeword at each level.
        weight_BP: weight by feedback level; 0 leaves a target out (padding too).
    """
    total = (-logp_BPM.sum(-1) * weight_BP).sum()
    return total / weight_BP.sum().clamp_min(1e-8)


def ldpo_loss(score_BP: Tensor, level_BP: Tensor, request_BP: Tensor, valid_BP: Tensor, *, beta: float) -> Tensor:
    """Listwise DPO: each item against itself and *all* items of lower levels in its request (RankGR Eq. 8).

    -(beta pi_k - logsumexp(beta pi_k, beta pi_i for level_i < level_k)), averaged over the items that have anything
    below them (the paper prints a sum, which would scale with the length of the lists). Without such an item the loss
    is 0 and has zero gradients.

    Args:
        score_BP: pi, the item's log-probability (Eq. 5).
        level_BP: feedback level.
        request_BP: items with equal numbers in a row were shown together.
        valid_BP: false for padding.
        beta: inverse temperature.
    """
    scaled = beta * score_BP
    lower_BPP = lower_in_request(level_BP, request_BP, valid_BP)
    contributes = lower_BPP.any(-1)
    itself = torch.eye(score_BP.shape[1], dtype=torch.bool, device=score_BP.device)
    others = scaled[:, None, :].masked_fill(~(lower_BPP | itself), float("-inf"))
    loss_BP = torch.logsumexp(others, dim=-1) - scaled
    return (loss_BP * contributes).sum() / contributes.sum().clamp_min(1)


def lower_in_request(level_BP: Tensor, request_BP: Tensor, valid_BP: Tensor) -> Tensor:
    """lower_BPP: whether target j is of a lower level than target i of the same request."""
    same_request = request_BP[:, :, None] == request_BP[:, None, :]
    return same_request & (level_BP[:, None, :] < level_BP[:, :, None]) & valid_BP[:, None, :] & valid_BP[:, :, None]


def rank_head_loss(score_QC: Tensor, label_QC: Tensor, retained_QC: Tensor) -> Tensor:
    """Binary cross-entropy over the retained codewords, summed per prediction and averaged over predictions (Eq. 16).

    Args:
        score_QC: logits of the rank head.
        label_QC: 1 for the codeword of a positive.
        retained_QC: false for padding.
    """
    loss = F.binary_cross_entropy_with_logits(score_QC, label_QC.to(score_QC.dtype), reduction="none")
    predictions = retained_QC.any(-1).sum().clamp_min(1)
    return (loss * retained_QC).sum() / predictions
