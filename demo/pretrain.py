"""Trains the tiny CLIP of the demo on captioned stills of moving shapes (it never sees a motion), or tests it.

    python demo/pretrain.py            # 30 minutes on two cores; stop it and start it again as you like
    python demo/pretrain.py --eval     # zero-shot accuracy of demo/tiny_clip.pt on stills that it has not seen

In reading order: the batches, the training loop, the test.
"""

import argparse
import math
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from shapes import CAPTION, WORDS, stills

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clip_loader import CLIP, Tokenizer, load_clip  # noqa: E402
from model import NORMS  # noqa: E402

SIZES = dict(image_size=64, patch_size=16, width=128, layers=6, embed_dim=128,
             vocab_size=514, context_length=72, text_width=64, text_layers=2)  # fmt: skip
TOKENIZER = Tokenizer()  # no merges: bytes
PATTERN = CAPTION.format(**{key: f'(?P<{key}>{"|".join(choices)})' for key, choices in WORDS.items()})  # caption -> words


def images(frames):
    """Frames (n, 64, 64, 3) uint8 -> what CLIP sees (n, 3, 64, 64)."""
    mean, std = torch.tensor(NORMS['clip'])
    return ((torch.from_numpy(frames) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def labels(captions):
    """The words of each caption: indices (n, attributes) into the lists of WORDS."""
    words = [re.fullmatch(PATTERN, caption).groupdict() for caption in captions]
    return torch.tensor([[choices.index(word[key]) for key, choices in WORDS.items()] for word in words])


class Batches(torch.utils.data.Dataset):
    """Batch number i, always the same one: images (n, 3, 64, 64), token ids (n, longest) and labels (n, attributes)."""

    def __init__(self, first, last, size):
        self.first, self.last, self.size = first, last, size

    def __len__(self):
        return self.last - self.first

    def __getitem__(self, i):
        frames, captions = stills(np.random.default_rng([1, self.first + i]), self.size, alike=16)
        tokens = TOKENIZER(captions, SIZES['context_length'])
        return images(frames), tokens[:, : tokens.count_nonzero(1).max()], labels(captions)


def clip_loss(image, text, scale):
    """CLIP's symmetric cross-entropy of features (n, D) and (n, D), and how often an image finds its own caption."""
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T  # (n, n)
    own = torch.arange(len(logits))
    loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    return loss, (logits.argmax(1) == own).float().mean().item()


def word_loss(logits, label):
    """Cross-entropy of every attribute's word, read off a feature: (n, all words) against (n, attributes); and its hits."""
    parts = logits.split([len(choices) for choices in WORDS.values()], dim=1)
    loss = sum(F.cross_entropy(part, own) for part, own in zip(parts, label.T))
    return loss, [(part.argmax(1) == own).float().mean().item() for part, own in zip(parts, label.T)]


def train(out, steps, batch, lr, warmup=100, save_every=100):
    """Train and save to `out` in OpenAI's names and half precision; goes on from `out`.resume if that is there.

    CLIP's loss alone stays for long with what is easy to see (colour, ground). So `read`, one linear layer for both towers,
    which is thrown away at the end, has to find every word of the caption in either feature.
    """
    resume = Path(f'{out}.resume')
    torch.manual_seed(0)
    clip = CLIP(**SIZES)
    torch.nn.init.normal_(clip.visual.positional_embedding, std=0.5)  # as loud as the patches, or places are learned late
    read = torch.nn.Linear(SIZES['embed_dim'], sum(map(len, WORDS.values())))
    both = torch.nn.ModuleList([clip, read])
    decay, plain = ([p for p in both.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False))
    groups = [dict(params=decay, weight_decay=0.05), dict(params=plain, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    start = 0
    if resume.exists():
        saved = torch.load(resume, weights_only=True)
        both.load_state_dict(saved['model'])
        optimizer.load_state_dict(saved['optimizer'])
        start = saved['step']
    loader = torch.utils.data.DataLoader(Batches(start, steps, batch), batch_size=None, num_workers=1, prefetch_factor=4)
    clock, log = time.time(), []
    for step, (pixels, tokens, label) in enumerate(loader, start + 1):
        for group in optimizer.param_groups:
            group['lr'] = lr * min(step / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        image, text = clip.visual(pixels), clip.encode_text(tokens)
        loss, hit = clip_loss(image, text, clip.logit_scale.exp())
        (seen, hits), (told, _) = word_loss(read(image), label), word_loss(read(text), label)
        optimizer.zero_grad()
        (loss + seen + told).backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        clip.logit_scale.data.clamp_(max=math.log(100))
        log.append([loss.item(), seen.item(), told.item(), hit, *hits])
        if step % 20 == 0:
            seconds, mean = (time.time() - clock) / len(log), np.mean(log, axis=0)
            print(f'step {step}/{steps}  loss {mean[0]:.3f} + {mean[1]:.3f} + {mean[2]:.3f}  own caption {mean[3]:.0%}, '
                  + ' '.join(f'{key} {hit:.0%}' for key, hit in zip(WORDS, mean[4:]))
                  + f'  {seconds:.2f} s a step, {seconds * (steps - step) / 60:.0f} min left', flush=True)
            clock, log = time.time(), []
        if step % save_every == 0 or step == steps:
            replace(dict(model=both.state_dict(), optimizer=optimizer.state_dict(), step=step), resume)
            replace({name: x.half() for name, x in clip.state_dict().items()}, out)


def replace(state, path):
    """Save so that the file under its own name is always whole."""
    torch.save(state, f'{path}.tmp')
    os.replace(f'{path}.tmp', path)


# ---- The test


@torch.no_grad()
def evaluate(path, n=2048, among=64):
    """Print how well the weights in `path` know unseen stills: zero-shot, then by a linear probe of each block's patches."""
    clip = load_clip(path)
    frames, captions = stills(np.random.default_rng(2), n)
    words = [re.fullmatch(PATTERN, caption).groupdict() for caption in captions]
    image = torch.cat([clip.visual(images(part)) for part in np.split(frames, n // among)])

    def text(captions):
        tokens = TOKENIZER(captions, SIZES['context_length'])
        return torch.cat([F.normalize(clip.encode_text(part), dim=1) for part in tokens.split(256)])

    own = (image.unflatten(0, (-1, among)) @ text(captions).unflatten(0, (-1, among)).mT).argmax(-1)
    print(f'zero-shot, {n} unseen stills: own caption among {among} {(own == torch.arange(among)).float().mean():.1%}')
    for key, choices in WORDS.items():  # the true caption against those with another word in this place
        some = words[:256]
        texts = text([CAPTION.format(**{**word, key: choice}) for word in some for choice in choices])
        best = torch.einsum('nd,ncd->nc', image[:256], texts.unflatten(0, (-1, len(choices)))).argmax(1).tolist()
        right = np.mean([choices[i] == word[key] for i, word in zip(best, some)])
        print(f'  {key:8s} {right:6.1%}  (chance {1 / len(choices):.0%})')

    frames, captions = stills(np.random.default_rng(3), 3 * n)
    label = labels(captions)
    tokens = clip.visual.embed(images(frames))
    print('linear probe of the patch tokens: ' + ', '.join(WORDS))
    for number, block in enumerate(clip.visual.transformer.resblocks):
        tokens = block(tokens)
        x = tokens[:, 1:].flatten(1)
        x = F.pad((x - x.mean(0)) / x.std(0), (0, 1), value=1.0)  # (3n, L * D + 1)
        gram = x[n:].T @ x[n:] + 300 * torch.eye(x.shape[1])
        rights = []
        for own in label.T:
            weight = torch.linalg.solve(gram, x[n:].T @ F.one_hot(own[n:]).float())
            rights.append(((x[:n] @ weight).argmax(1) == own[:n]).float().mean())
        print(f'  block {number}: ' + ', '.join(f'{right:.0%}' for right in rights))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default=str(Path(__file__).with_name('tiny_clip.pt')))
    parser.add_argument('--steps', type=int, default=4000)
    parser.add_argument('--batch', type=int, default=128)
    parser.add_argument('--lr', type=float, default=1e-3)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--eval', action='store_true', help='test the weights in --out, train nothing')
    args = vars(parser.parse_args())
    torch.set_num_threads(args.pop('threads'))
    if not args.pop('eval'):
        train(**args)
    evaluate(args['out'])
