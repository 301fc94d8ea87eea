"""The generative retriever: codeword tokens on a decoder, an output layer over codewords only, a rank head.

Shapes: B rows, H history items, N positions, D hidden width, P targets, M levels, K codewords a level.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.retriever import packing
from components.retriever.backbone import build_backbone, run_decoding
from components.retriever.losses import ldpo_loss, lower_in_request, ntp_loss, rank_head_loss
from components.retriever.packed_attention import PackedPass
from components.retriever.packing import Batch
from components.retriever.rank_head import RankHead
from infra.errors import ConfigError
from infra.sections import LossConfig, RetrieverConfig

_MAX_LOG_ODDS = 30.0
_MOST_CHILDREN = 1 << 29  # numbers of one byte in the largest table of children
N_LEVELS_OF_FEEDBACK = 5  # 0 is never used; 1..4 are G1..G4


@dataclass(frozen=True)
class Encoded:
    """Hidden states of a packed batch.

    Attributes:
        hidden_BND: after the last layer.
        n_history: S, positions of the history.
    """

    hidden_BND: Tensor
    n_history: int


class Retriever(nn.Module):
    """RankGR's model: `encode` packed rows, `level_logits` over codewords, `loss` of all phases.

    Args:
        config: sizes.
        codes_NM: SID of every item; part of the state, so that weights and SIDs never part.
        n_codes: K.
        positive_level: events from this level on are label 1 of the rank head.
        architecture: of the backbone, as saved with the weights (`architecture_of`); None loads a pretrained one.

    Raises:
        ConfigError: `rank_heads` does not divide the backbone's width; a code space too large for `codeword_softmax: children`.
        ServiceError: the backbone cannot be loaded.
    """

    sid_codes: Tensor

    def __init__(
        self,
        config: RetrieverConfig,
        codes_NM: npt.NDArray[np.integer],
        *,
        n_codes: int,
        positive_level: int = 3,
        architecture: str | None = None,
    ) -> None:
        super().__init__()
        self.config, self.n_codes, self.positive_level = config, n_codes, positive_level
        self.n_levels = int(codes_NM.shape[1])
        self.register_buffer("sid_codes", torch.as_tensor(np.asarray(codes_NM), dtype=torch.int64))
        for level, (nodes_N, children_CK) in enumerate(_children(codes_NM, n_codes) if config.codeword_softmax == "children" else ()):
            self.register_buffer(f"sid_nodes_{level}", nodes_N, persistent=False)
            self.register_buffer(f"sid_children_{level}", children_CK, persistent=False)
        self.backbone, self.first_token, architecture = build_backbone(
            config, n_codewords=self.n_levels * n_codes, architecture=architecture
        )
        if architecture:  # travels with the weights, which can then be restored where the backbone's folder is not
            self.register_buffer("backbone_config", torch.frombuffer(bytearray(architecture, "utf-8"), dtype=torch.uint8))
        width = int(self.embedding.embedding_dim)
        if width % config.rank_heads:
            raise ConfigError(
                f"retriever.rank_heads={config.rank_heads} does not divide the width of the backbone, {width}",
                where=f"retriever.backbone={config.backbone}",
                mend="choose another number of heads",
            )
        self.merges = config.history == "merged"
        self.token_merger = nn.Linear(self.n_levels * width, width, bias=False) if self.merges else None
        self.feedback = nn.Embedding(N_LEVELS_OF_FEEDBACK, width) if config.history_levels else None
        for module in (self.token_merger, self.feedback):
            if module is not None:
                nn.init.normal_(module.weight, std=0.02 if module is self.feedback else (self.n_levels * width) ** -0.5)
        self.repeat = nn.Parameter(torch.zeros(1)) if config.repeat_bias else None
        self.dropout = nn.Dropout(config.dropout)
        self.rank_head = RankHead(width, heads=config.rank_heads, mlp=config.rank_mlp, dropout=config.dropout)

    @property
    def embedding(self) -> nn.Embedding:
        """The backbone's token table, which holds the codewords too."""
        table = self.backbone.get_input_embeddings()  # type: ignore[operator]
        assert isinstance(table, nn.Embedding)
        return table

    @property
    def width(self) -> int:
        """w: positions that a history item takes."""
        return 1 if self.merges else self.n_levels

    def token_ids(self, codes: Tensor, level: int | Tensor) -> Tensor:
        """Token ids of codewords of a level."""
        return self.first_token + level * self.n_codes + codes

    def codebook(self, level: int) -> Tensor:
        """emb(c) of all codewords of a level, [K, D]: input and output embedding are one table (Eq. 4)."""
        start = self.first_token + level * self.n_codes
        return self.embedding.weight[start : start + self.n_codes]

    def history_embeddings(self, items_BH: Tensor, levels_BH: Tensor) -> Tensor:
        """Input embeddings of [BOS] and the history, [B, 1 + w H, D]; merged by GenRec Eq. 5 or one a codeword."""
        return self._input_embeddings(items_BH, levels_BH, items_BH.new_empty(len(items_BH), 0))[0]

    def _input_embeddings(self, items_BH: Tensor, levels_BH: Tensor, tokens_BX: Tensor) -> tuple[Tensor, Tensor]:
        """[BOS] with the history, and further tokens: one look-up for all, since the gradient of each is as large as the table."""
        b, h = items_BH.shape
        level = torch.arange(self.n_levels, device=items_BH.device)
        history_ids = self.token_ids(self.sid_codes[items_BH], level).flatten(1)
        ids = torch.cat([history_ids.new_full((b, 1), self.first_token - 1), history_ids, tokens_BX], dim=1)
        bos, codewords, tokens = self.embedding(ids).split([1, h * self.n_levels, tokens_BX.shape[1]], dim=1)
        codewords = codewords.reshape(b, h, self.n_levels, self.embedding.embedding_dim)
        if self.token_merger is not None:
            codewords = self.token_merger(codewords.flatten(2))[:, :, None]
        if self.feedback is not None:
            codewords = codewords + self.feedback(levels_BH)[:, :, None]
        return torch.cat([bos, codewords.flatten(1, 2)], dim=1), tokens

    def encode(self, batch: Batch, target_codes_BPM: Tensor) -> Encoded:
        """Run the backbone over histories and targets packed into one row each.

        Args:
            target_codes_BPM: codes of the targets; the last level is not read.
        """
        level = torch.arange(self.n_levels - 1, device=target_codes_BPM.device)
        read = self.token_ids(target_codes_BPM[..., :-1], level).flatten(1)
        history, targets = self._input_embeddings(batch.items_BH, batch.levels_BH, read)
        positions = packing.position_ids(batch, n_levels=self.n_levels, width=self.width)
        attention = PackedPass(batch, n_levels=self.n_levels, width=self.width)
        hidden = run_decoding(self.backbone, self.dropout(torch.cat([history, targets], dim=1)), positions, attention)
        return Encoded(hidden, history.shape[1])

    def prediction_positions(self, batch: Batch) -> Tensor:
        """positions_BPM whose hidden state predicts each codeword of each target: history's last, then the target's own."""
        n_targets, tail = batch.target_items_BP.shape[1], self.n_levels - 1
        first = packing.history_positions(batch.target_prefix_BP, self.width)[..., None]
        n_history = 1 + self.width * batch.items_BH.shape[1]
        own = n_history + torch.arange(n_targets * tail, device=first.device).view(1, n_targets, tail)
        return torch.cat([first, own.expand(len(first), -1, -1)], dim=-1)

    def level_logits(self, hidden: Tensor, level: int) -> Tensor:
        """Inner products with the codewords of a level (Eq. 4); softmax over them gives p_l."""
        return hidden @ self.codebook(level).T

    def target_logits(self, encoded: Encoded, batch: Batch) -> list[Tensor]:
        """Per level, logits_BPK at the positions that predict the targets; -inf where `codeword_softmax` rules a codeword out.

        In fp32 under autocast too, as losses want them.
        """
        positions = self.prediction_positions(batch)
        sizes = [self.first_token, *[self.n_codes] * self.n_levels]
        _, *codebooks = self.embedding.weight.split_with_sizes(sizes)  # of which the gradient is put together once, not level by level
        logits = [(take(encoded.hidden_BND, positions[..., i]) @ codebook_KD.T).float() for i, codebook_KD in enumerate(codebooks)]
        if self.repeat is not None:
            codes_BPM = self.sid_codes[batch.target_items_BP]
            place_H = torch.arange(batch.items_BH.shape[1], device=codes_BPM.device)
            seen_BPH = place_H < batch.target_prefix_BP[..., None]
            logits[-1] = logits[-1] + self.repeat_bias(self.sid_codes[batch.items_BH], seen_BPH, codes_BPM[..., :-1])
        if self.config.codeword_softmax == "level":
            return logits
        return [x.masked_fill(~self.continues(batch.target_items_BP, level), float("-inf")) for level, x in enumerate(logits)]

    def repeat_bias(self, history_BHM: Tensor, seen_BPH: Tensor, codes_BPl: Tensor) -> Tensor:
        """bias_BPK of the last level's codewords: `repeat` for those that lead back to an item of the history, 0 for others.

        Args:
            history_BHM: SIDs of the history.
            seen_BPH: which of it lies before the prediction.
            codes_BPl: earlier codewords of the prediction, all levels but the last.
        """
        assert self.repeat is not None
        same_BPH = seen_BPH & (codes_BPl[:, :, None] == history_BHM[:, None, :, :-1]).all(-1)
        times_BPK = torch.zeros(*codes_BPl.shape[:2], self.n_codes, device=codes_BPl.device)
        times_BPK.scatter_add_(2, history_BHM[:, None, :, -1].expand(same_BPH.shape), same_BPH.to(times_BPK.dtype))
        return self.repeat * times_BPK.clamp_max_(1)

    def continues(self, items_BP: Tensor, level: int) -> Tensor:
        """mask_BPK of the codewords of a level with which any item goes on from the earlier codewords of the given ones."""
        nodes_N, children_CK = self.get_buffer(f"sid_nodes_{level}"), self.get_buffer(f"sid_children_{level}")
        return children_CK[nodes_N[items_BP]]

    def forward(self, batch: Batch, loss: LossConfig, share: Tensor | None = None) -> dict[str, Tensor]:
        """Joint loss L = NTP + alpha LDPO + rsp_weight BCE (RankGR Eq. 11, 17).

        Args:
            batch: packed rows.
            loss: weights of the parts.
            share: this batch's part of the `loss_counts` of all batches of a step. Each part of the loss is a mean; weighed
                like this, those of the batches add up to the mean over all of them. None: the batch is the whole step.

        Returns:
            `loss` and its detached parts `ntp`, `ldpo`, `bce`.
        """
        codes_BPM = self.sid_codes[batch.target_items_BP]
        encoded = self.encode(batch, codes_BPM)
        logits = self.target_logits(encoded, batch)
        share = logits[0].new_ones(2 + self.n_levels) if share is None else share
        logp = torch.stack([_log_likelihood(x, codes_BPM[..., m], loss.label_smoothing) for m, x in enumerate(logits)], dim=-1)
        parts = {"ntp": share[0] * ntp_loss(logp, self._ntp_weights(batch, loss))}
        total = parts["ntp"]
        if loss.alpha > 0:
            exact = logp if loss.label_smoothing == 0 else _gather_logp(logits, codes_BPM)
            ldpo = ldpo_loss(exact.sum(-1), batch.target_levels_BP, batch.target_request_BP, batch.target_valid_BP, beta=loss.beta)
            parts["ldpo"] = share[1] * ldpo
            total = total + loss.alpha * parts["ldpo"]
        if loss.rsp_weight > 0:
            parts["bce"] = (share[2:] * self._rank_head_losses(encoded, batch, logits, codes_BPM, loss)).sum()
            total = total + loss.rsp_weight * parts["bce"]
        return {"loss": total, **{name: part.detach() for name, part in parts.items()}}

    def loss_counts(self, batch: Batch, loss: LossConfig) -> Tensor:
        """What the means of the loss are taken over, [2 + M]: weight of NTP, items of LDPO, predictions of BCE at each level."""
        codes_BPM = self.sid_codes[batch.target_items_BP]
        lower_BPP = lower_in_request(batch.target_levels_BP, batch.target_request_BP, batch.target_valid_BP)
        predictions = [
            self._predictions(batch, codes_BPM, level)[1].sum(1).clamp_max(loss.rsp_predictions).sum() for level in range(self.n_levels)
        ]
        return torch.stack([self._ntp_weights(batch, loss).sum(), lower_BPP.any(-1).sum(), *predictions]).float()

    def _ntp_weights(self, batch: Batch, loss: LossConfig) -> Tensor:
        weights = torch.tensor([loss.ntp_level_weights.get(i, 0.0) for i in range(N_LEVELS_OF_FEEDBACK)], device=self.sid_codes.device)
        return weights[batch.target_levels_BP] * batch.target_valid_BP

    def _predictions(self, batch: Batch, codes_BPM: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """For each target the positives [B, P, P] that share its request and earlier codewords, and the first of each group."""
        positive_BP = (batch.target_levels_BP >= self.positive_level) & batch.target_valid_BP
        group_BPP = _same_prefix(batch, codes_BPM[..., :level]) & positive_BP[:, None, :]
        return group_BPP, _first_of_each(group_BPP) & positive_BP

    def _rank_head_losses(self, encoded: Encoded, batch: Batch, logits: list[Tensor], codes_BPM: Tensor, loss: LossConfig) -> Tensor:
        """BCE of each level (Eq. 16), [M]. Predictions with the same prefix are one row with several labels, not several rows."""
        losses = []
        for level in range(self.n_levels):
            group_BPP, chosen_BP = self._predictions(batch, codes_BPM, level)
            rows_BQ, real_BQ = _select(chosen_BP, loss.rsp_predictions)
            # Row q collects the codewords of all positives that share its request and earlier codewords.
            group_BQP = take(group_BPP, rows_BQ)
            logits_BQK = take(logits[level].detach(), rows_BQ)
            label_BQK = torch.zeros_like(logits_BQK)
            label_BQK.scatter_add_(2, codes_BPM[..., level][:, None, :].expand_as(group_BQP), group_BQP.to(label_BQK.dtype))
            label_BQK = label_BQK.clamp_max(1)
            prior_BQC, kept_BQC = self.rank_prior(logits_BQK.log_softmax(-1)), None
            if loss.train_lambdas[level] < self.n_codes:
                kept_BQC = retain_codewords(logits_BQK, label_BQK, loss.train_lambdas[level])
                prior_BQC, label_BQK = prior_BQC.gather(2, kept_BQC), label_BQK.gather(2, kept_BQC)
            score_BQC = self.rank_scores(encoded, batch, rows_BQ, kept_BQC, level).float() + prior_BQC
            retained = real_BQ[..., None].expand_as(score_BQC)
            losses.append(rank_head_loss(score_BQC.flatten(0, 1), label_BQK.flatten(0, 1), retained.flatten(0, 1)))
        return torch.stack(losses)

    def rank_prior(self, logp: Tensor) -> Tensor:
        """What a candidate's rank-head logit starts from: IAP's log odds, or 0 (`rank_prior: none`, Eq. 15 as printed).

        The codeword's probability is what minimises Eq. 16, so that a head which starts from IAP's own estimate has only
        its corrections to learn.

        Args:
            logp: log-probabilities of candidates by IAP; no gradient flows back into them.
        """
        if self.config.rank_prior == "none":
            return torch.zeros_like(logp)
        logp = logp.detach().float().clamp(-_MAX_LOG_ODDS, -1e-6)
        return logp - torch.log(-torch.expm1(logp))

    def rank_scores(self, encoded: Encoded, batch: Batch, targets_BQ: Tensor, codes_BQC: Tensor | None, level: int) -> Tensor:
        """Rank-head logits_BQC of candidate codewords (None: all) of some targets (Eq. 13-15), without their prior."""
        history, own = encoded.hidden_BND[:, : encoded.n_history], encoded.hidden_BND[:, encoded.n_history :]
        tail = self.n_levels - 1
        own_BPTD = own.reshape(len(own), -1, tail, own.shape[-1]) if tail else own[:, :0, None]
        index = targets_BQ[..., None, None].expand(-1, -1, level, own.shape[-1])
        last = packing.history_positions(batch.target_prefix_BP.gather(1, targets_BQ), self.width)
        visible = torch.arange(encoded.n_history, device=last.device) <= last[..., None]
        own_BQLD = own_BPTD[:, :, :level].gather(1, index) if level else own.new_zeros(*targets_BQ.shape, 0, own.shape[-1])
        return torch.as_tensor(self.rank_head(self.codebook(level), codes_BQC, history, visible, own_BQLD))


def _children(codes_NM: npt.NDArray[np.integer], n_codes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Per level: the number of each item's prefix, nodes_N, and which codewords follow on each of C prefixes, children_CK."""
    for level in range(codes_NM.shape[1]):
        _, nodes_N = np.unique(codes_NM[:, :level], axis=0, return_inverse=True) if level else (None, np.zeros(len(codes_NM), np.int64))
        nodes_N = nodes_N.reshape(-1)
        if (int(nodes_N.max(initial=0)) + 1) * n_codes > _MOST_CHILDREN:
            raise ConfigError(
                f"retriever.codeword_softmax=children needs a table of {nodes_N.max() + 1:,} prefixes by {n_codes:,} codewords",
                where=f"level {level + 1} of the SIDs",
                mend="set it to level",
            )
        children_CK = torch.zeros(int(nodes_N.max(initial=0)) + 1, n_codes, dtype=torch.bool)
        children_CK[nodes_N, codes_NM[:, level]] = True
        yield torch.as_tensor(nodes_N), children_CK


def architecture_of(weights: Mapping[str, Tensor]) -> str | None:
    """The backbone's architecture out of a retriever's state; None for `tiny`, which is built from the configuration."""
    saved = weights.get("backbone_config")
    return None if saved is None else saved.numpy().tobytes().decode()


def take(values_BNX: Tensor, index_BQ: Tensor) -> Tensor:
    """values_BQX: entries of each row at the given positions."""
    return values_BNX.gather(1, index_BQ[..., None].expand(-1, -1, values_BNX.shape[-1]))


def _select(chosen_BP: Tensor, at_most: int) -> tuple[Tensor, Tensor]:
    """Positions of true entries of each row, a random sample where there are more than `at_most`; and which are no padding."""
    count = chosen_BP.sum(1).clamp_max(at_most)
    order = torch.rand(chosen_BP.shape, device=count.device).masked_fill(~chosen_BP, -1.0).argsort(dim=1, descending=True)
    order = order[:, : max(int(count.max()), 1)]
    return order, torch.arange(order.shape[1], device=count.device) < count[:, None]


def retain_codewords(logits_BQK: Tensor, label_BQK: Tensor, count: int) -> Tensor:
    """The `count` most probable codewords (Eq. 12); true ones are forced in, or the row would have no positive."""
    forced = logits_BQK.masked_fill(label_BQK > 0, float("inf"))
    return forced.topk(min(count, logits_BQK.shape[-1]), dim=-1).indices


def _log_likelihood(logits_BPK: Tensor, codes_BP: Tensor, smoothing: float) -> Tensor:
    loss = F.cross_entropy(logits_BPK.flatten(0, 1), codes_BP.flatten(), reduction="none", label_smoothing=smoothing)
    return -loss.view(codes_BP.shape)


def _gather_logp(logits: list[Tensor], codes_BPM: Tensor) -> Tensor:
    return torch.stack([_log_likelihood(x, codes_BPM[..., m], 0.0) for m, x in enumerate(logits)], dim=-1)


def _same_prefix(batch: Batch, codes_BPl: Tensor) -> Tensor:
    """Pairs of valid targets of one request that share all earlier codewords, [B, P, P]."""
    same = (codes_BPl[:, :, None] == codes_BPl[:, None, :]).all(-1)
    same = same & (batch.target_request_BP[:, :, None] == batch.target_request_BP[:, None, :])
    return same & batch.target_valid_BP[:, :, None] & batch.target_valid_BP[:, None, :]


def _first_of_each(same_BPP: Tensor) -> Tensor:
    """True for targets that have no earlier one in their group."""
    p = same_BPP.shape[1]
    earlier = torch.ones(p, p, dtype=torch.bool, device=same_BPP.device).tril(-1)
    return ~(same_BPP & earlier).any(-1)
