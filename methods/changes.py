"""CLIP's frames one after the other, as in `concat`, but from each the mean of its clip is taken away: what changes, and when.

Nothing of it trains, or one linear layer: what a method that sees more has to beat.
"""

import torch.nn.functional as F
from torch import nn

from model import cosine


class Method(nn.Module):
    options = dict(
        layer=0,                # width of a trained linear layer on the changes; 0: none, nothing trains
    )
    sees = ('image',)

    def __init__(self, clip, names, config):
        super().__init__()
        dim, width = clip.visual.proj.shape[1], config['layer']
        self.layer = nn.Linear(dim, width, bias=False) if width else nn.Identity()
        if width:
            nn.init.eye_(self.layer.weight)

    def video(self, image):
        """CLIP's image features (V, T, embed_dim), of length 1 and less their mean -> those of all frames (V, T * width)."""
        image = F.normalize(image.float(), dim=-1)
        return (self.layer(image - image.mean(1, keepdim=True)).flatten(1),)

    def scores(self, kept, episode):
        """20 times the cosine of a query to the mean of each class's supports: its frame t meets their frames t."""
        support, query = episode.split(episode.take(kept[0]))
        return 20 * cosine(query, episode.by_class(support))
