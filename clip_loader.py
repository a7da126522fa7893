"""CLIP's weights and tokenizer: from a file in OpenAI's names to a CLIP module. In reading order: CLIP, load_clip, Tokenizer."""

import hashlib
import html
import math

import ftfy
import regex
import torch
from torch import nn

from model import Transformer, ViT


class CLIP(nn.Module):
    """Both towers, with the parameter names of OpenAI's state dicts (the image tower below `visual.`)."""

    def __init__(self, image_size, patch_size, width, layers, embed_dim,
                 vocab_size=None, context_length=None, text_width=None, text_layers=None, act='quick_gelu'):
        super().__init__()
        self.visual = ViT(image_size, patch_size, width, layers, embed_dim, act)
        self.context_length, self.vocab_size = context_length, vocab_size
        if vocab_size:
            self.token_embedding = nn.Embedding(vocab_size, text_width)
            self.positional_embedding = nn.Parameter(torch.randn(context_length, text_width) * 0.01)
            self.transformer = Transformer(text_width, text_layers, act)
            self.ln_final = nn.LayerNorm(text_width)
            self.text_projection = nn.Parameter(torch.randn(text_width, embed_dim) * text_width ** -0.5)
            self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
            nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_image(self, images):
        """Normalised images (B, 3, H, W) -> features (B, embed_dim)."""
        return self.visual(images)

    def encode_text(self, tokens):
        """Token ids (B, context_length), end-of-text the largest id -> features (B, embed_dim)."""
        causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).tril()
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]]
        x = self.ln_final(self.transformer(x, causal))
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection


def geometry(state):
    """The constructor arguments of CLIP, read off a state dict in OpenAI's names."""
    def depth(prefix):
        return len({name.split('.')[prefix.count('.')] for name in state if name.startswith(prefix)})

    width, _, patch_size, _ = state['visual.conv1.weight'].shape
    grid = round((len(state['visual.positional_embedding']) - 1) ** 0.5)
    sizes = dict(image_size=grid * patch_size, patch_size=patch_size, width=width,
                 layers=depth('visual.transformer.resblocks.'), embed_dim=state['visual.proj'].shape[1])
    if 'token_embedding.weight' in state:
        vocab_size, text_width = state['token_embedding.weight'].shape
        sizes.update(vocab_size=vocab_size, text_width=text_width, context_length=len(state['positional_embedding']),
                     text_layers=depth('transformer.resblocks.'))
    return sizes


def load_clip(path):
    """A state dict file in OpenAI's names -> CLIP in float32, evaluation mode, with its `weights_hash`."""
    state = torch.load(path, map_location='cpu', weights_only=True)
    state = {name: x.float() for name, x in state.items() if name not in ('input_resolution', 'context_length', 'vocab_size')}
    clip = CLIP(**geometry(state)).eval().requires_grad_(False)
    clip.load_state_dict(state)
    clip.weights_hash = weights_hash(clip.visual)
    return clip


def weights_hash(module):
    """SHA-256 over a module's float32 parameters in the order of their names: the same for one set of weights, however stored."""
    digest = hashlib.sha256()
    for name, x in sorted(module.state_dict().items()):
        digest.update(name.encode() + x.float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def clean(text):
    """What CLIP did to its captions: mend broken Unicode and HTML entities, one space between words, lower case."""
    return ' '.join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def byte_alphabet():
    """CLIP's 256 printable stand-ins for bytes, in vocabulary order: a dict byte -> character."""
    printable = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


class Tokenizer:
    """CLIP's byte-pair encoding. merges: its pairs of parts in order, or None for bytes alone (514 ids, the demo's CLIP)."""

    words = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.I)

    def __init__(self, merges=None):
        self.alphabet = byte_alphabet()
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(merges or ())}
        bytes_ = list(self.alphabet.values())
        vocabulary = [*bytes_, *(b + '</w>' for b in bytes_), *map(''.join, self.ranks), '<|startoftext|>', '<|endoftext|>']
        self.ids = {part: i for i, part in enumerate(vocabulary)}
        self.vocab_size = len(vocabulary)
        self.sot, self.eot = self.vocab_size - 2, self.vocab_size - 1

    def encode(self, text):
        """A text -> its ids, without start and end."""
        return [i for word in self.words.findall(clean(text)) for i in self.encode_word(word)]

    def encode_word(self, word):
        if word in ('<|startoftext|>', '<|endoftext|>'):
            return [self.ids[word]]
        parts = [self.alphabet[b] for b in word.encode()]
        parts[-1] += '</w>'
        while len(parts) > 1:  # join the pair that was learned first, until no neighbours are a known pair
            rank, i = min((self.ranks.get(pair, math.inf), i) for i, pair in enumerate(zip(parts, parts[1:])))
            if rank == math.inf:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        return [self.ids[part] for part in parts]

    def __call__(self, texts, context_length=77, truncate=False):
        """A list of n texts -> ids (n, context_length) int64: start, text, end (the largest id), then zeros.

        A text that is too long raises ValueError, or loses its tail with truncate=True.
        """
        tokens = torch.zeros(len(texts), context_length, dtype=torch.int64)
        for row, text in zip(tokens, texts):
            ids = [self.sot, *self.encode(text), self.eot]
            if len(ids) > context_length:
                if not truncate:
                    raise ValueError(f'Text of {len(ids)} tokens, longer than {context_length}: "{text[:60]}..."')
                ids[context_length - 1:] = [self.eot]
            row[:len(ids)] = torch.tensor(ids)
        return tokens
