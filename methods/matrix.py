"""T x T trained numbers: how much frame a of a query has to say to frame b of a class, on CLIP's frame features.

What a method with millions of parameters has to beat.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Method(nn.Module):
    options = dict(
        layer=0,                # width of a trained linear layer between CLIP and the matrix; 0: none
    )
    sees = ('image',)

    def __init__(self, clip, names, config):
        super().__init__()
        dim, width = clip.visual.proj.shape[1], config['layer']
        self.layer = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width)) if width else nn.Identity()
        self.matrix = nn.Parameter(4 * torch.eye(config['frames']))  # [query's frame, class's frame]

    def video(self, image):
        """CLIP's image features (V, T, embed_dim) -> the same or the layer's, each of length 1."""
        return (F.normalize(self.layer(image).float(), dim=-1),)

    def scores(self, kept, episode):
        """The sum over all pairs of frames of matrix times cosine, where features are seen from the middle of the supports."""
        features = episode.take(kept[0])  # (E, B, T, embed_dim)
        middle = episode.split(features)[0].mean((1, 2), keepdim=True)
        support, query = episode.split(F.normalize(features - middle, dim=-1))
        prototypes = F.normalize(episode.by_class(support), dim=-1)  # (E, N, T, embed_dim)
        with torch.autocast(query.device.type, enabled=False):
            weighted = torch.einsum('ab,enbd->enad', self.matrix, prototypes)
            return query.flatten(2) @ weighted.flatten(2).transpose(1, 2)
