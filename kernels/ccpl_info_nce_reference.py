"""InfoNCE in plain PyTorch: the definition that every backend is measured against."""

import torch


def info_nce_reference(query, key, temperature=0.07):
    """-log(exp(q_i·k_i/τ) / sum over j of exp(q_i·k_j/τ)) for every row i (Sun 2025, eq. 7); key is a constant."""
    accumulated = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(accumulated), key.detach().to(accumulated)
    logits = query @ key.transpose(1, 2) / temperature
    return torch.logsumexp(logits, dim=2) - torch.diagonal(logits, dim1=1, dim2=2)
