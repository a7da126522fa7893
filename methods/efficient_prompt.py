"""Efficient-Prompt (Ju et al. 2022): learned vectors around a class's name, read by CLIP's frozen text tower, and a small
transformer over the frames.

Nothing of CLIP trains; gradients pass through the text tower into the vectors. All names share them, also names that were
never trained on. As in the paper there is one vector for each place before and after a name; the published code holds one for
each of the 77 places of a text, so that there a name's length decides which of them follow it.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from clip_loader import readable, tokenizer_of
from model import Transformer, cosine


class Method(nn.Module):
    options = dict(
        prefix=16,              # learned vectors before a class's name
        postfix=16,             # and after it
        layers=1,               # blocks over the frames; 0: the frames' mean, and the vectors alone train
        temp=1 / 0.07,          # factor of the cosines
    )
    sees = ('image',)
    text = closed_set = True

    def __init__(self, clip, names, config):
        super().__init__()
        clip.texts(['a name'], ['{}'])  # fails here where CLIP cannot read
        self.clip, self.tokenizer, self.temp = clip, tokenizer_of(clip), config['temp']
        self.prefix, self.postfix, self.layers = config['prefix'], config['postfix'], config['layers']
        count, width = self.prefix + self.postfix, clip.token_embedding.embedding_dim
        self.vectors = nn.Parameter(0.01 * torch.randn(count, width), requires_grad=count > 0)
        if self.layers:
            dim = clip.visual.proj.shape[1]
            if dim % 8:
                raise ValueError(f"CLIP's features are {dim} wide, which 8 heads cannot share.")
            self.time = nn.Parameter(0.01 * torch.randn(config['frames'], dim))
            self.transformer = Transformer(dim, self.layers, 'quick_gelu')
            for block in self.transformer.resblocks:
                block.attn.heads = 8  # at any width
                nn.init.kaiming_uniform_(block.attn.out_proj.weight, 5 ** 0.5)  # as nn.MultiheadAttention's starts
        self.spelled, self.known_texts = {}, {}
        self.spell(names or ['a name'])  # fails here where a name is too long

    def video(self, image):
        """CLIP's image features (V, T, D) -> the mean of the frames, which have looked at each other, (V, D)."""
        if self.layers:
            image = self.transformer(image + self.time)
        return (image.float().mean(1),)

    def scores(self, kept, episode):
        """Cosines of a query to the texts of its episode's class names, times temp."""
        _, query = episode.split(episode.take(kept[0]))  # (E, M, D)
        return episode.of_ways(self.temp * cosine(query, self.texts(episode.names)))

    def texts(self, names):
        """Class names -> (N, D); while nothing trains, computed once for the same names."""
        if self.training:
            return self.encode(names)
        key = tuple(names)
        if key not in self.known_texts:
            with torch.no_grad():
                self.known_texts[key] = self.encode(names)
        return self.known_texts[key]

    def train(self, mode=True):
        """Also what eval() calls: the vectors may be others since texts were last computed."""
        self.known_texts = {}
        return super().train(mode)

    def encode(self, names):
        """Class names -> text features (N, D): CLIP.encode_text with the learned vectors among those of the words."""
        clip, (words, places, ends) = self.clip, self.spelling(names)
        x = F.embedding(places, torch.cat([clip.token_embedding(words), self.vectors]))  # (N, L, text width)
        length = x.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        x = clip.transformer(x + clip.positional_embedding[:length], causal)
        return clip.ln_final(x[torch.arange(len(x), device=x.device), ends]) @ clip.text_projection

    @torch.compiler.disable  # it is Python, about strings
    def spelling(self, names):
        """`spell`, done once for the same names, on the device."""
        device = self.vectors.device
        key = (*names, device)
        if key not in self.spelled:
            self.spelled[key] = [x.to(device) for x in self.spell(names)]
        return self.spelled[key]

    def spell(self, names):
        """Class names -> the ids that occur in them (W,); of every place of each text (N, L) which of these, or from W on which
        learned vector, stands there; and the place of each text's end (N,). L is the length of the longest."""
        tokenizer, size = self.tokenizer, self.clip.vocab_size
        learned = list(range(size, size + len(self.vectors)))  # as if the vocabulary had these too
        before, after = learned[:self.prefix], learned[self.prefix:]
        texts = []
        for name in names:
            ids = [tokenizer.sot, *before, *tokenizer.encode(readable(name)), *after, tokenizer.eot]
            if len(ids) > self.clip.context_length:
                raise ValueError(f'The class {name!r} between prefix={self.prefix} and postfix={self.postfix} is {len(ids)} '
                                 f'tokens; CLIP reads {self.clip.context_length}. Lower these two or shorten the name.')
            texts.append(torch.tensor(ids))
        ends = torch.tensor([len(ids) - 1 for ids in texts])
        used, places = pad_sequence(texts, batch_first=True).unique(return_inverse=True)  # what follows an end is not seen
        return used[used < size], places, ends
