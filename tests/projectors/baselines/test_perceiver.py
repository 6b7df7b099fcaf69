"""`perceiver` against a loop over latents and heads."""

import torch
from projector_checks import make_batch, make_projector
from torch.nn import functional as F

OPTIONS = {"num_queries": 3, "depth": 2, "heads": 2, "head_dim": 4}


def slow_layer(layer, latents, patches):
    """One layer for one image: (T, C) latents, (N, C) valid patches; new latents and attention per head."""
    normed = layer.latent_norm(latents)
    read = torch.cat([layer.patch_norm(patches), normed])
    out, attention = torch.zeros(len(latents), 8), torch.zeros(2, len(latents), len(read))
    for head in range(2):
        own = slice(4 * head, 4 * head + 4)
        for t in range(len(latents)):
            query = layer.query.weight[own] @ normed[t]
            keys = read @ layer.key_value.weight[:8][own].T
            values = read @ layer.key_value.weight[8:][own].T
            scores = torch.stack([query @ key / 4**0.5 for key in keys])
            attention[head, t] = scores.softmax(0)
            out[t, own] = sum(w * v for w, v in zip(attention[head, t], values, strict=True))
    latents = latents + out @ layer.out.weight.T
    hidden = F.gelu(layer.ffn[0](latents) @ layer.ffn[1].weight.T)
    return latents + hidden @ layer.ffn[3].weight.T, attention


def test_tokens_and_assignment_are_those_of_a_loop():
    projector = make_projector("perceiver", **OPTIONS)
    features, _ = make_batch([(4, 3), (2, 2)], cut=[(1, 1), (0, 0)])
    with torch.no_grad():
        result = projector(features)
        for b in range(2):
            latents = projector.latents
            for layer in projector.layers:
                latents, attention = slow_layer(layer, latents, features.patches[b][features.valid[b]])
            torch.testing.assert_close(result.tokens[b], projector.head(projector.norm(latents)), atol=1e-4, rtol=1e-4)
            share = attention.mean(0)[:, : int(features.valid[b].sum())]
            share = share / share.sum(1, keepdim=True)
            torch.testing.assert_close(result.assignment[b][:, features.valid[b]], share, atol=1e-5, rtol=1e-4)


def test_a_image_without_a_valid_patch_gives_numbers():
    features, _ = make_batch([(4, 3)])
    features.valid[:] = False
    assert make_projector("perceiver", **OPTIONS)(features).tokens.isfinite().all()


def test_the_assignment_passes_no_gradient():
    projector = make_projector("perceiver", **OPTIONS)
    assert not projector(make_batch([(4, 3)])[0]).assignment.requires_grad
