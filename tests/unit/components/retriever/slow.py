"""The retriever a second time, slow and obvious: one plain causal sequence for each target, loops for everything else.

What packing, vectorised losses and beam search compute is compared with this. Only the parameters are shared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from components.retriever.model import Retriever
from components.retriever.packing import Row
from components.retriever.rank_head import RankHead
from infra.sections import LossConfig, RetrieverConfig


def tiny_model(codes: Sequence[Sequence[int]], *, n_codes: int, seed: int = 0, **settings: object) -> Retriever:
    """A model whose random weights are large enough for the outputs to differ, in evaluation mode."""
    sizes = {"hidden_size": 16, "layers": 2, "heads": 2, "kv_heads": 1, "ff_size": 32, "rank_heads": 2, "rank_mlp": 16}
    config = RetrieverConfig.model_validate({**sizes, "dropout": 0.0, "max_history": 8, **settings})
    torch.manual_seed(seed)
    model = Retriever(config, np.asarray(codes), n_codes=n_codes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)
        if model.repeat is not None:
            model.repeat.fill_(-1.5)
    return model.eval()


def row(items: Sequence[int], levels: Sequence[int], targets: Sequence[tuple[int, int, int, int]]) -> Row:
    """Targets are (item, level, prefix, request)."""
    columns = np.asarray(targets, dtype=np.int64).reshape(-1, 4).T
    return Row(np.asarray(items, dtype=np.int64), np.asarray(levels, dtype=np.int64), *columns)


def history_embedding(model: Retriever, item: int, level: int) -> list[Tensor]:
    """Input embeddings of one history item: a single one if the model merges its codewords."""
    table = model.embedding.weight
    codes = model.sid_codes[item].tolist()
    tokens = [table[model.first_token + m * model.n_codes + code] for m, code in enumerate(codes)]
    if model.token_merger is not None:
        tokens = [model.token_merger(torch.cat(tokens))]
    if model.feedback is not None:
        tokens = [token + model.feedback.weight[level] for token in tokens]
    return tokens


def hidden_states(model: Retriever, items: Sequence[int], levels: Sequence[int], own: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Hidden states of [BOS] with the history, and of a target's own codewords, under the backbone's own causal mask."""
    table = model.embedding.weight
    sequence = [table[model.first_token - 1]]
    for item, level in zip(items, levels, strict=True):
        sequence += history_embedding(model, int(item), int(level))
    n_history = len(sequence)
    sequence += [table[model.first_token + m * model.n_codes + code] for m, code in enumerate(own)]
    hidden = model.backbone(inputs_embeds=torch.stack(sequence)[None], use_cache=False).last_hidden_state[0]
    return hidden[:n_history], hidden[n_history:]


def codeword_logits(model: Retriever, history: Tensor, own: Tensor, sid: Sequence[int] = (), items: Sequence[int] = ()) -> list[Tensor]:
    """Per level, the logits [K]: the first from the last history position, the others from the target's own codewords.

    With a repeat bias, it is added at the last level where the codeword leads to one of `items`, the history.
    With a softmax over children, codewords with which no item goes on from those of `sid` get -inf.
    """
    logits = []
    known = [item.tolist() for item in model.sid_codes]
    for level, hidden in enumerate([history[-1], *own]):
        start = model.first_token + level * model.n_codes
        row = [hidden @ model.embedding.weight[start + code] for code in range(model.n_codes)]
        if model.repeat is not None and level == model.n_levels - 1:
            seen = [known[item] for item in items]
            row = [x + model.repeat[0] if [*sid[:level], code] in seen else x for code, x in enumerate(row)]
        if model.config.codeword_softmax == "children":
            goes_on = [any(item[: level + 1] == [*sid[:level], code] for item in known) for code in range(model.n_codes)]
            row = [x if real else torch.tensor(-math.inf) for x, real in zip(row, goes_on, strict=True)]
        logits.append(torch.stack(row))
    return logits


def rank_score(head: RankHead, codeword: Tensor, states: Sequence[Tensor]) -> Tensor:
    """RankGR Eq. 13-15 for one codeword: one attention weight after the other."""
    width = len(codeword) // head.heads
    codeword = head.norm(codeword)
    query, keys, values = head.query(codeword), [head.key(h) for h in states], [head.value(h) for h in states]
    attended, matches = [], []
    for g in range(head.heads):
        part = slice(g * width, (g + 1) * width)
        weights = [torch.exp(query[part] @ key[part] / math.sqrt(width)) for key in keys]
        attended.append(sum(w * value[part] for w, value in zip(weights, values, strict=True)) / sum(weights))
        matches.append(torch.log(sum(weights) / len(weights)))
    return head.mlp(torch.cat([*attended, codeword, torch.stack(matches)]))[0]


def prior(model: Retriever, logits: Tensor, code: int) -> float:
    """Log odds of a codeword by IAP, where the rank head starts from them."""
    if model.config.rank_prior == "none":
        return 0.0
    # An only child has odds without end, a codeword that was ruled out has none.
    p = min(max(float(torch.softmax(logits.detach().double(), 0)[code]), math.exp(-30)), math.exp(-1e-6))
    return math.log(p / (1 - p))


def sid_score(model: Retriever, items: Sequence[int], levels: Sequence[int], sid: Sequence[int], score: str) -> float:
    """Sum over levels of log p (iap), log s (rsp), or both (RankGR Eq. 5, 18)."""
    history, own = hidden_states(model, items, levels, sid[:-1])
    total = 0.0
    for level, logits in enumerate(codeword_logits(model, history, own, sid, items)):
        if score in ("iap", "sum"):
            total += float(logits[sid[level]] - torch.logsumexp(logits, 0))
        if score in ("rsp", "sum"):
            states = [*history, *own[:level]]
            logit = rank_score(model.rank_head, model.codebook(level)[sid[level]], states)
            total += float(F.logsigmoid(logit + prior(model, logits, sid[level])))
    return total


def ldpo(scores: Sequence[Tensor], levels: Sequence[int], requests: Sequence[object], beta: float) -> Tensor:
    """RankGR Eq. 8, item by item."""
    losses = []
    for score, level, request in zip(scores, levels, requests, strict=True):
        lower = [s for s, other, r in zip(scores, levels, requests, strict=True) if other < level and r == request]
        if lower:
            losses.append(torch.logsumexp(torch.stack([beta * s for s in [score, *lower]]), 0) - beta * score)
    return torch.stack(losses).mean() if losses else torch.zeros(())


def losses(model: Retriever, rows: Sequence[Row], config: LossConfig) -> dict[str, Tensor]:
    """All parts of the loss, for rows with at most `rsp_predictions` predictions a level."""
    scores, levels, requests, weighted, weight_sum = [], [], [], torch.zeros(()), 0.0
    groups: list[dict[tuple[object, ...], tuple[list[int], Tensor, list[Tensor]]]] = [{} for _ in range(model.n_levels)]
    for r, packed in enumerate(rows):
        for t, item in enumerate(packed.target_items):
            prefix, level, request = int(packed.target_prefix[t]), int(packed.target_levels[t]), (r, int(packed.target_request[t]))
            sid = model.sid_codes[item].tolist()
            history, own = hidden_states(model, packed.items[:prefix], packed.levels[:prefix], sid[:-1])
            logits = codeword_logits(model, history, own, sid, packed.items[:prefix])
            logp = [F.log_softmax(x, 0) for x in logits]
            smoothing = config.label_smoothing
            even = [smoothing * x.mean() if smoothing else 0.0 for x in logp]
            smooth = [(1 - smoothing) * x[code] + mean for x, code, mean in zip(logp, sid, even, strict=True)]
            weight = config.ntp_level_weights.get(level, 0.0)
            weighted, weight_sum = weighted - weight * sum(smooth), weight_sum + weight
            scores.append(sum(x[code] for x, code in zip(logp, sid, strict=True)))
            levels.append(level)
            requests.append(request)
            if level >= model.positive_level:
                for m in range(model.n_levels):
                    group = groups[m].setdefault((request, *sid[:m]), ([], logits[m], [*history, *own[:m]]))
                    group[0].append(sid[m])
    bce = torch.zeros(())
    for m, of_level in enumerate(groups):
        sums = [_bce(model, m, *group, count=config.train_lambdas[m]) for group in of_level.values()]
        bce = bce + (torch.stack(sums).mean() if sums else torch.zeros(()))
    parts = {
        "ntp": weighted / weight_sum if weight_sum else torch.zeros(()),
        "ldpo": ldpo(scores, levels, requests, config.beta),
        "bce": bce,
    }
    return {"loss": parts["ntp"] + config.alpha * parts["ldpo"] + config.rsp_weight * parts["bce"], **parts}


def _bce(model: Retriever, level: int, positives: list[int], logits: Tensor, states: list[Tensor], *, count: int) -> Tensor:
    """Of one prediction: its true codewords and the most probable others, `count` in all."""
    others = [code for code in logits.argsort(descending=True).tolist() if code not in positives]
    kept = [*set(positives), *others][:count]
    terms = []
    for code in kept:
        s = torch.sigmoid(rank_score(model.rank_head, model.codebook(level)[code], states) + prior(model, logits, code))
        terms.append(-torch.log(s) if code in positives else -torch.log(1 - s))
    return torch.stack(terms).sum()
