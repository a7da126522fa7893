"""Matching networks (Vinyals et al. 2016), the siamese rule of thesis 3.1.2, on a trained layer over CLIP's frame features."""

import torch.nn.functional as F
from torch import nn

from model import class_scores, cosine, frame_layer


class Method(nn.Module):
    options = dict(
        temp=20.0,              # Temp in (3.7), the factor of the cosines
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
        """The logarithm of a class's probability, softmax over all supports (3.7) summed over its own, but for the divisor that
        all classes share."""
        support, query = episode.split(episode.take(kept[0]))
        similarity = self.temp * cosine(query, support)  # (E, M, S)
        shots = F.one_hot(episode.labels, episode.classes.shape[1]).sum(0)  # (N,)
        return class_scores(similarity, episode) + shots.log()  # (E, M, N): the sum, not the mean, over a class's supports
