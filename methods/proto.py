"""Prototypical networks (Snell et al. 2017) on a trained layer over CLIP's frame features: the least that trains."""

import torch.nn.functional as F
from torch import nn

from model import cosine, frame_layer


class Method(nn.Module):
    options = dict(
        temp=20.0,              # factor of the cosines
    )
    sees = ('image',)

    def __init__(self, clip, names, config):
        super().__init__()
        dim = clip.visual.proj.shape[1]
        self.temp = config['temp']
        self.layer = frame_layer(dim)

    def video(self, image):
        """CLIP's image features (V, T, D) -> the mean of the layer's over the frames, of length 1, (V, D)."""
        return (F.normalize(self.layer(image).float().mean(1), dim=-1),)

    def scores(self, kept, episode):
        """Temp times the cosine of a query to the mean of each class's supports, the class's prototype."""
        support, query = episode.split(episode.take(kept[0]))
        return self.temp * cosine(query, episode.by_class(support))
