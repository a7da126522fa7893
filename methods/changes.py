"""`concat` without what stays the same: from each frame's features the mean of its clip is taken away. Nothing trained."""

import torch.nn.functional as F
from torch import nn

from model import cosine


class Method(nn.Module):
    sees = ('image',)

    def __init__(self, clip, names, config):
        super().__init__()

    def video(self, image):
        """CLIP's image features (V, T, embed_dim) -> those of all frames less their mean, (V, T * embed_dim)."""
        image = F.normalize(image.float(), dim=-1)
        return ((image - image.mean(1, keepdim=True)).flatten(1),)

    def scores(self, kept, episode):
        """100 times the cosine of a query to the mean of each class's supports: its frame t meets their frames t."""
        support, query = episode.split(episode.take(kept[0]))
        return 100 * cosine(query, episode.by_class(support))
