"""Start the codewords of a retriever where quantization put them, so that training begins with what their SIDs know.

Shapes: N items, M levels, K codewords a level, F width of the quantized features, D hidden width.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from components.retriever.model import Retriever

_NORM = 0.5
_NOISE = 0.1


@torch.no_grad()
def start_from_codebooks(model: Retriever, codebooks_MKF: npt.NDArray[np.float32]) -> None:
    """Set the codeword embeddings to the codebooks, seen in the D leading principal components of the items' reconstructions.

    The first level's codewords get norm 1/2 on average, the further ones keep their proportion to them: a sum of codewords
    then is an item's reconstruction. That is what the token merger starts from, beside a tenth of its random weights. Input
    and output embedding are one table, so that an untrained model already ranks near what was seen last.

    Args:
        model: fresh; changed in place.
        codebooks_MKF: of the quantizer that gave the model its SIDs.
    """
    books_MKF = torch.from_numpy(np.ascontiguousarray(codebooks_MKF)).to(model.embedding.weight)
    width = int(model.embedding.embedding_dim)
    items_NF = sum((books_MKF[level][model.sid_codes[:, level]] for level in range(model.n_levels)), books_MKF.new_zeros(()))
    mean_F = items_NF.mean(0)
    _, _, directions_RF = torch.linalg.svd(items_NF - mean_F, full_matrices=False)
    basis_FR = directions_RF[:width].T
    seen: list[Tensor] = [(books_MKF[level] - (mean_F if level == 0 else 0)) @ basis_FR for level in range(model.n_levels)]
    scale = _NORM / seen[0].norm(dim=1).mean().clamp_min(1e-8)
    for level, codewords_KR in enumerate(seen):
        model.codebook(level).zero_()[:, : codewords_KR.shape[1]] = codewords_KR * scale
    if model.token_merger is not None:
        identity = torch.eye(width).to(model.token_merger.weight)
        model.token_merger.weight.mul_(_NOISE).add_(torch.cat([identity] * model.n_levels, dim=1))
