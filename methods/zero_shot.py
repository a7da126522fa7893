"""CLIP itself, nothing trained and no support looked at: mean-pooled frames against texts about the class names."""

import torch.nn.functional as F
from torch import nn

from model import cosine


class Method(nn.Module):
    sees = ('image',)
    text = closed_set = True

    def __init__(self, clip, names, config):
        super().__init__()
        self.clip, self.templates = clip, config['templates']
        clip.texts(names or ['a name'], self.templates)  # fails here where CLIP cannot read them

    def video(self, image):
        """CLIP's image features (V, T, embed_dim) -> their mean over the frames, each of length 1, (V, embed_dim)."""
        return (F.normalize(image.float(), dim=-1).mean(1),)

    def scores(self, kept, episode):
        """100 times the cosine of a query to the texts of its episode's class names."""
        _, query = episode.split(episode.take(kept[0]))
        texts = self.clip.texts(episode.names, self.templates)  # (names, embed_dim)
        return episode.of_ways(100 * cosine(query, texts))
