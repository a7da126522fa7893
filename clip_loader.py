"""CLIP: its two towers, its weights from wherever they are, its tokenizer.

In reading order: the module (CLIP), the one door (load_clip), finding files (find_weights; tools/fetch.py fetches them,
tools/weights.py reads them), what the shapes tell and other resolutions (geometry, resize_positions), text (Tokenizer).

Whatever a user can get wrong raises OSError or ValueError with one sentence; the scripts end with that sentence.
"""

import gzip
import hashlib
import html
import importlib.util
import json
import math
import os
import re

import ftfy
import regex
import torch
import torch.nn.functional as F
from torch import nn

from model import ACTIVATIONS, Transformer, ViT
from tools.fetch import fetch, sha256_of
from tools.weights import openai_names, read_state

ADDRESS = 'https://openaipublic.azureedge.net/clip/models'  # /<SHA-256>/<file>: the addresses and digests of OpenAI's clip.py
MODELS = {  # name: (SHA-256 of OpenAI's file, image size, patch size, width, layers, embedding, text width)
    'ViT-B/32': ('40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af', 224, 32, 768, 12, 512, 512),
    'ViT-B/16': ('5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f', 224, 16, 768, 12, 512, 512),
    'ViT-L/14': ('b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836', 224, 14, 1024, 24, 768, 768),
    'ViT-L/14@336px': ('3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02', 336, 14, 1024, 24, 768, 768),
}
MERGES = ('https://github.com/openai/CLIP/blob/main/clip/bpe_simple_vocab_16e6.txt.gz?raw=true',
          '924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a')


class CLIP(nn.Module):
    """Both towers, with the parameter names of OpenAI's state dicts (the image tower below `visual.`)."""

    def __init__(self, image_size, patch_size, width, layers, embed_dim,
                 vocab_size=None, context_length=None, text_width=None, text_layers=None, act='quick_gelu'):
        super().__init__()
        self.visual = ViT(image_size, patch_size, width, layers, embed_dim, act)
        self.context_length, self.vocab_size, self.known_texts = context_length, vocab_size, {}
        if vocab_size:
            self.token_embedding = nn.Embedding(vocab_size, text_width)
            self.positional_embedding = nn.Parameter(torch.randn(context_length, text_width) * 0.01)
            self.transformer = Transformer(text_width, text_layers, act)
            self.ln_final = nn.LayerNorm(text_width)
            self.text_projection = nn.Parameter(torch.randn(text_width, embed_dim) * text_width ** -0.5)
            self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
            nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_text(self, tokens):
        """Token ids (B, context_length), end-of-text the largest id -> features (B, embed_dim)."""
        causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).tril()
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]]
        x = self.ln_final(self.transformer(x, causal))
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection

    @torch.no_grad()
    def texts(self, class_names, templates):
        """Class names and templates with a {} -> (N, embed_dim) float32 unit text features: a class's mean over its templates.

        Computed once for the same names. ValueError: no text tower, a template without {}, a text too long. OSError: the
        tokenizer's merges cannot be fetched.
        """
        if not self.vocab_size:
            raise ValueError('Class names need a text tower, and these CLIP weights hold the image tower alone.')
        if wrong := [template for template in templates if '{}' not in template]:
            raise ValueError(f'A template needs {{}} where the class name goes: {wrong[0]!r}.')
        key, device = (*class_names, None, *templates), self.logit_scale.device
        if key not in self.known_texts:
            tokenizer, weights = tokenizer_of(self), []
            with torch.autocast(device.type, enabled=False):
                for name in class_names:
                    texts = [template.replace('{}', readable(name)) for template in templates]
                    features = self.encode_text(tokenizer(texts, self.context_length).to(device))
                    weights.append(F.normalize(F.normalize(features, dim=-1).mean(0), dim=-1))
            self.known_texts[key] = torch.stack(weights)
        return self.known_texts[key].to(device)


def load_clip(source, act=None, image_size=None, norm='clip'):
    """source -> CLIP in float32, evaluation mode, all frozen, with `act` and the `weights_hash` of its image tower.

    source: a name (MODELS: OpenAI's weights, found or fetched), 'random:<name>' (its geometry, seeded random weights), or a
    file: OpenAI's TorchScript archive, a state dict of torch.save, or safetensors; in OpenAI's, open_clip's or Hugging Face's
    names; of both towers or the image tower alone. act: 'quick_gelu', 'gelu' or None, see default_act. image_size: side of
    the images in pixels if not the weights' own. norm: of NORMS, what pixels are normalised by. OSError: no such file, no
    network. ValueError: not such weights.
    """
    if source.startswith('random:'):
        stored = random_state(source.removeprefix('random:'))
        act = act or 'quick_gelu'
    else:
        path = find_weights(source)
        stored = read_state(path)
        act = act or default_act(path)
    if act not in ACTIVATIONS:
        raise ValueError(f'{source}: the activation {act!r} is none of {", ".join(ACTIVATIONS)}.')
    state = openai_names(stored)
    sizes = geometry(state, source)
    if image_size and image_size != sizes['image_size']:
        grid, rest = divmod(image_size, sizes['patch_size'])
        if rest:
            raise ValueError(f'image_size={image_size} is no multiple of {source}\'s patches, {sizes["patch_size"]} pixels.')
        name = 'visual.positional_embedding'
        state[name], sizes['image_size'] = resize_positions(state[name].float(), grid), image_size
    with torch.device('meta'):  # no memory, no random numbers: the tensors of the file become the parameters
        clip = CLIP(**sizes, act=act)
    expected = clip.state_dict()
    if 'input_resolution' in stored:  # OpenAI's archives may hold any tensor that was an attribute, not parameters alone
        state = {name: x for name, x in state.items() if name in expected}
    check(state, expected, source)
    clip.load_state_dict({name: x.float().contiguous() for name, x in state.items()}, assign=True)
    clip.eval().requires_grad_(False)
    clip.visual.norm, clip.act, clip.weights_hash = norm, act, weights_hash(clip.visual.state_dict())
    return clip


def weights_hash(state):
    """SHA-256 over a state dict in float32, sorted by name: the same for the same weights, however they were stored."""
    digest = hashlib.sha256()
    for name, x in sorted(state.items()):
        digest.update(name.encode() + x.float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def default_act(path):
    """The activation these weights were trained with, as far as a file tells.

    OpenAI trained with QuickGELU, x * sigmoid(1.702 x); most of open_clip's own models (LAION, DataComp, ...) with GELU. The
    tensors look the same, and the wrong choice gives no error, only worse features. The configuration that Hugging Face
    keeps beside weights (open_clip_config.json, config.json) says which; a file without one is taken for OpenAI's.
    """
    def beside(name):
        try:
            with open(os.path.join(os.path.dirname(path), name), encoding='utf-8') as file:
                content = json.load(file)
            return content if isinstance(content, dict) else {}
        except (OSError, ValueError):
            return {}

    if 'model_cfg' in (content := beside('open_clip_config.json')):
        return 'quick_gelu' if content['model_cfg'].get('quick_gelu') else 'gelu'
    content = beside('config.json')
    return content.get('vision_config', content).get('hidden_act', 'quick_gelu')


def random_state(name, seed=0):
    """Random weights of a named geometry, the same every time: for benchmarks and dry runs."""
    if name not in MODELS:
        raise ValueError(f'random:{name}: the geometries are {", ".join(MODELS)}.')
    _, image_size, patch_size, width, layers, embed_dim, text_width = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIP(image_size, patch_size, width, layers, embed_dim, 49408, 77, text_width, 12).state_dict()


# ---- files: found, or fetched and verified ---------------------------------------------------------------------------------

def cache_folder():
    """Where OpenAI's own package keeps its weights: ~/.cache/clip, or CLIP_CACHE."""
    return os.path.expanduser(os.environ.get('CLIP_CACHE') or '~/.cache/clip')


def find_weights(source):
    """A name of MODELS or a path -> the path of an existing file; a named one is fetched if the cache lacks it."""
    if source in MODELS:
        sha256, file = MODELS[source][0], re.sub('[/@]', '-', source) + '.pt'
        return fetch(f'{ADDRESS}/{sha256}/{file}', os.path.join(cache_folder(), file), sha256)
    if not os.path.isfile(source):
        raise FileNotFoundError(f'There is no CLIP file {source!r}; --clip= names another, {", ".join(MODELS)}, random:<name>.')
    return source


def find_merges():
    """The tokenizer's merges file: that of an installed clip or open_clip package, else cached or fetched as weights are."""
    file = 'bpe_simple_vocab_16e6.txt.gz'
    for package in ('clip', 'open_clip'):
        spec = importlib.util.find_spec(package)  # finds it without importing it
        for folder in (spec and spec.submodule_search_locations) or ():
            if sha256_of(path := os.path.join(folder, file)) == MERGES[1]:
                return path
    return fetch(MERGES[0], os.path.join(cache_folder(), file), MERGES[1])


# ---- names and shapes ------------------------------------------------------------------------------------------------------

def geometry(state, source):
    """The constructor arguments of CLIP, read off a state dict in OpenAI's names. ValueError: not a CLIP with a ViT."""
    def depth(prefix):
        return len({name.split('.')[prefix.count('.')] for name in state if name.startswith(prefix)})

    ranks = {'visual.conv1.weight': 4, 'visual.positional_embedding': 2, 'visual.proj': 2}
    if 'token_embedding.weight' in state:
        ranks.update({'token_embedding.weight': 2, 'positional_embedding': 2})
    if wrong := [name for name, rank in ranks.items() if name not in state or state[name].ndim != rank]:
        raise ValueError(f'{source} holds no CLIP with a Vision Transformer: expected {", ".join(wrong)}; found '
                         f'{len(state)} tensors: {few([f"{name} {list(x.shape)}" for name, x in state.items()])}.')
    width, _, patch_size, _ = state['visual.conv1.weight'].shape
    if width > 1024:  # the number of heads is not in the weights
        raise ValueError(f'{source} is {width} wide. CLIPs wider than 1024 (ViT-H, g, G) have heads that are not 64 wide, '
                         f'which this code does not build.')
    places = len(state['visual.positional_embedding'])
    grid = math.isqrt(places - 1)
    if grid ** 2 + 1 != places:
        raise ValueError(f'{source}: visual.positional_embedding has {places} places, not 1 more than a square.')
    sizes = dict(image_size=grid * patch_size, patch_size=patch_size, width=width,
                 layers=depth('visual.transformer.resblocks.'), embed_dim=state['visual.proj'].shape[1])
    if 'token_embedding.weight' in state:
        vocab_size, text_width = state['token_embedding.weight'].shape
        sizes.update(vocab_size=vocab_size, text_width=text_width, context_length=len(state['positional_embedding']),
                     text_layers=depth('transformer.resblocks.'))
    return sizes


def few(items, count=4):
    return ', '.join(items[:count]) + (f', and {len(items) - count} more' if len(items) > count else '')


def check(state, expected, source):
    """ValueError that names a few of each kind if `state` does not have exactly the names and shapes of `expected`."""
    faults = dict(
        missing=[name for name in expected if name not in state],
        unexpected=[name for name in state if name not in expected],
        misshapen=[f'{name} {list(state[name].shape)} instead of {list(x.shape)}'
                   for name, x in expected.items() if name in state and state[name].shape != x.shape])
    if any(faults.values()):
        raise ValueError(f'{source} is not a CLIP as expected from its first tensors. '
                         + '; '.join(f'{kind}: {few(names)}' for kind, names in faults.items() if names) + '.')


def resize_positions(positions, grid):
    """Positional embedding (1 + g*g, D) -> (1 + grid*grid, D): bicubic over the patches, the class token's as it is.

    With antialiasing, as open_clip and timm do it.
    """
    old = math.isqrt(len(positions) - 1)
    patches = positions[1:].T.unflatten(1, (old, old))[None]  # (1, D, g, g)
    patches = F.interpolate(patches, (grid, grid), mode='bicubic', antialias=True)
    return torch.cat([positions[:1], patches[0].flatten(1).T])


# ---- text ------------------------------------------------------------------------------------------------------------------

def tokenizer_of(clip):
    """The tokenizer that a CLIP was trained with: bytes alone if its vocabulary has 514 ids, else CLIP's merges."""
    if clip.vocab_size == 514:
        return Tokenizer()
    with gzip.open(find_merges(), 'rt', encoding='utf-8') as file:
        lines = file.read().split('\n')
    return Tokenizer(line.split() for line in lines[1:49152 - 256 - 2 + 1])  # a head line, and more merges than CLIP uses


def readable(class_name):
    """'ApplyEyeMakeup', 'brush_hair', 'Moving [something] up' -> words: 'Apply Eye Makeup', 'brush hair', without brackets."""
    name = re.sub(r'(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|_', ' ', class_name)
    return ' '.join(re.sub(r'[][{}<>]', '', name).split())


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

    words = regex.compile(r"<\|(?:start|end)oftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.I)

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
