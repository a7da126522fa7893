"""X-CLIP (Ni et al. 2022): a copy of CLIP's image tower whose frames exchange messages, and texts that look at the video.

In every block a frame sends a message, which meets those of the other frames and comes back as one more token for its own
(cross-frame communication). A block over time makes one vector of a video's frames (multi-frame integration), and for each
video the texts of the class names are prompted by its patches.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from model import MLP, Attention, Block, cosine


class Message(nn.Module):
    """Cross-frame communication: the new parts of one block of CLIP."""

    def __init__(self, dim, zero_start):
        super().__init__()
        self.write = nn.Linear(dim, dim)
        self.ln, self.attn = nn.LayerNorm(dim), Attention(dim, dim // 64)
        nn.init.kaiming_uniform_(self.attn.out_proj.weight, a=math.sqrt(5))  # as nn.MultiheadAttention begins
        self.gate = nn.Parameter(torch.zeros(())) if zero_start else None

    def forward(self, x, block, videos):
        """Tokens of the frames of V videos (V*T, 1+L, D) -> the same after this block of CLIP."""
        message = self.write(x[:, 0]).unflatten(0, (videos, -1))  # (V, T, D)
        h = self.ln(message)
        message = message + self.attn(h, h, h)
        h = block.ln_1(torch.cat([x, message.flatten(0, 1).unsqueeze(1)], 1))  # (V*T, 1+L+1, D)
        tokens = h[:, :-1]  # the message is looked at, and goes no further
        attended = block.attn(tokens, h, h)
        if self.gate is not None:
            alone = block.attn(tokens, tokens, tokens)  # even a message of 0 would take a share of the softmax
            attended = alone + self.gate * (attended - alone)
        x = x + attended
        return x + block.mlp(block.ln_2(x))


class Prompt(nn.Module):
    """One layer of video-specific prompting: texts look at what is seen in a video, then an MLP."""

    def __init__(self, dim):
        super().__init__()
        self.heads = dim // 64
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.out, self.mlp = nn.Linear(dim, dim), MLP(dim)

    def forward(self, texts, context):
        """Texts (V, N, embed_dim), context (V, L, embed_dim) -> texts (V, N, embed_dim)."""
        projected = self.q(self.ln_1(texts)), self.k(context), self.v(context)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in projected)  # (V, heads, N or L, embed_dim/heads)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        texts = texts + self.out(attended)
        return texts + self.mlp(self.ln_2(texts))


class Method(nn.Module):
    options = dict(
        finetune=8e-6,          # learning rate of the copy of CLIP's image tower, lr being that of what is new; 0: it is frozen
        smoothing=0.1,          # label smoothing of the loss
        zero_start=False,       # True: begins as CLIP itself; messages come in through a gate in each block, not published
    )
    text = True
    closed_set = True

    def __init__(self, clip, names, config):
        super().__init__()
        clip.texts(names or ['a name'], ['{}'])  # fails here where CLIP cannot read them
        width, dim = clip.visual.proj.shape
        if dim % 64:
            raise ValueError(f"CLIP's features are {dim} wide, which heads of 64 cannot share.")
        self.clip, self.finetune, self.smoothing = clip, config['finetune'], config['smoothing']
        self.sees = ('pixels',) if self.finetune else (0,)
        self.tower = copy.deepcopy(clip.visual).float().requires_grad_(self.finetune > 0)
        self.messages = nn.ModuleList(Message(width, config['zero_start']) for _ in self.tower.transformer.resblocks)
        self.positional_embedding = nn.Parameter(torch.zeros(config['frames'], dim))
        self.integrate = Block(dim, 'quick_gelu')
        self.ln_patches, self.ln_context = nn.LayerNorm(width), nn.LayerNorm(dim)
        self.to_context = nn.Parameter(torch.randn(width, dim))
        self.prompts = nn.ModuleList(Prompt(dim) for _ in range(2))
        self.alpha = nn.Parameter(torch.full((dim,), 0.0 if config['zero_start'] else 0.1))
        for layer in [*self.integrate.modules(), *self.prompts.modules()]:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        if config['zero_start']:
            nn.init.zeros_(self.integrate.attn.out_proj.weight)
            nn.init.zeros_(self.integrate.mlp.c_proj.weight)
        else:
            nn.init.trunc_normal_(self.positional_embedding, std=0.02)

    def video(self, seen):
        """Pixels or CLIP's first tokens (V, T, ...) -> the video's vector (V, embed_dim), its context (V, L, embed_dim)."""
        videos, x = len(seen), seen.flatten(0, 1)
        if self.finetune:
            x = self.tower.embed(self.tower.normalise(x))
        for message, block in zip(self.messages, self.tower.transformer.resblocks):
            x = message(x, block, videos)  # (V*T, 1+L, D)
        frames = self.tower.head(x).unflatten(0, (videos, -1))  # (V, T, embed_dim)
        vector = (self.integrate(frames + self.positional_embedding) + frames).mean(1)
        patches = self.ln_patches(x[:, 1:]).unflatten(0, (videos, -1)).mean(1)  # (V, L, D)
        return vector, self.ln_context(patches @ self.to_context)

    def scores(self, kept, episode):
        """CLIP's scale times the cosine of a query to the texts of its episode's class names, prompted by this query."""
        vector, context = (episode.split(episode.take(x))[1] for x in kept)  # (E, M, embed_dim), (E, M, L, embed_dim)
        texts = self.clip.texts(episode.names, ['{}'])[episode.classes]  # (E, N, embed_dim)
        texts = texts.repeat_interleave(vector.shape[1], 0)  # (E*M, N, embed_dim)
        prompted = self.prompted(texts, context.flatten(0, 1)).unflatten(0, vector.shape[:2])  # (E, M, N, embed_dim)
        return self.clip.logit_scale.exp() * cosine(vector.unsqueeze(2), prompted).squeeze(2)

    def prompted(self, texts, context):
        """Texts of length 1 (V, N, embed_dim), context (V, L, embed_dim) -> texts (V, N, embed_dim)."""
        # raw texts are prompted, whose lengths CLIP.texts does not keep: values of about 1, to which a new layer adds little
        texts = texts * math.sqrt(texts.shape[-1])
        prompt = texts
        for layer in self.prompts:
            prompt = layer(prompt, context)
        return texts + self.alpha * prompt

    def loss(self, kept, episode):
        """Cross-entropy with smoothed labels."""
        scores = self.scores(kept, episode)
        return F.cross_entropy(scores.flatten(0, 1), episode.answers.flatten(), label_smoothing=self.smoothing), scores

    def groups(self, lr):
        """What is new at lr, the tower at its own rate; vectors and positional embeddings without weight decay."""
        groups = {}
        for name, p in self.named_parameters():
            if p.requires_grad:
                rate = self.finetune if name.startswith('tower.') else lr
                still = p.ndim < 2 or name.endswith('positional_embedding')
                groups.setdefault((rate, still), []).append(p)
        return [dict(params=params, lr=rate, **(dict(weight_decay=0.0) if still else {}))
                for (rate, still), params in groups.items()]
