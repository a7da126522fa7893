"""CLIP's frames one after the other, as in `concat`, but from each the mean of its clip is taken away: what changes, and when.

Nothing of it trains, or a linear layer and T x T numbers do: what a method that sees more has to beat.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model import cosine


class Method(nn.Module):
    options = dict(
        layer=0,                # width of a trained linear layer, beside a trained matrix by which frames meet; 0: neither
    )
    sees = ('image',)

    def __init__(self, clip, names, config):
        super().__init__()
        dim, width = clip.visual.proj.shape[1], config['layer']
        self.layer = nn.Linear(dim, width, bias=False) if width else nn.Identity()
        if width:
            nn.init.eye_(self.layer.weight)
        self.matrix = nn.Parameter(torch.eye(config['frames']), requires_grad=width > 0)  # [class's frame, query's frame]

    def video(self, image):
        """CLIP's image features (V, T, embed_dim), of length 1 and less their mean -> those of all frames (V, T, width)."""
        image = F.normalize(image.float(), dim=-1)
        return (self.layer(image - image.mean(1, keepdim=True)),)

    def scores(self, kept, episode):
        """20 times the cosine of a query, its frames mixed by the matrix, to the mean of each class's supports."""
        support, query = episode.split(episode.take(kept[0]).float())
        with torch.autocast(query.device.type, enabled=False):
            query = self.matrix @ query  # (E, M, T, width)
        return 20 * cosine(query.flatten(2), episode.by_class(support).flatten(2))
