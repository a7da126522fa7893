"""What a checkpoint of VBA can and cannot tell apart on the demo: the figures of docs/what-vba-sees.md.

    python demo/sees.py --ckpt=runs/moving_shapes_vba/best.pt     # mistakes within groups, and what linear probes read
    python demo/sees.py --fewer=4 > runs/fewer.py                 # the demo's config with each fourth group to train on

In reading order: changes, kind (what there is to know of a class), mistakes, gaze, probes, fewer, main.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from shapes import MOTIONS, SPLITS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoint  # noqa: E402
import data  # noqa: E402
import encoding  # noqa: E402
from config import load_config, read_sample, resolve  # noqa: E402
from model import VBA, Episode  # noqa: E402
from reader import ClipReader  # noqa: E402

OPTIONS = dict(
    ckpt=None,                 # a checkpoint of VBA on the demo; its results.json lies beside it
    fewer=0,                   # n > 0: print the config with each n-th group of training motions, and end
)
KINDS = ('one then the other', 'the other then one', 'both at once', 'both, too far and back', 'back first, then both')
SAMPLE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'sample_configs', 'moving_shapes.py')


# ---- What there is to know of a class

def changes(name):
    """The sign of a motion's net change in each of the five channels, (5,) of 0, 1, 2 for less, none, more."""
    return np.sign(MOTIONS[name][0]).astype(int) + 1


def kind(name):
    """Where the corner of a motion lies, the place of its group's list in KINDS; -1 where two channels do not both change."""
    group = next(group for groups in SPLITS.values() for group in groups if name in group)
    return group.index(name) if np.abs(MOTIONS[name][0]).sum() == 2 else -1


# ---- Mistakes

def mistakes(path):
    """Prints, for what was trained in a results.json, how queries of motions of two channels were answered in their group."""
    with open(path) as file:
        rows = [row for row in json.load(file) if row['shot'] == 1 and row['checkpoint'] and not row['transductive']]
    for row in rows:
        kinds, counts = np.array([kind(name) for name in row['classes']]), np.array(row['confusion'], float)
        table = np.zeros((5, 5))
        for first in np.flatnonzero(kinds == 0):  # the classes of a group stand together
            table += counts[first:first + 5, first:first + 5]
        np.fill_diagonal(table, 0)  # right answers are also those of episodes across groups
        share = 100 * table / np.maximum(table.sum(1, keepdims=True), 1)
        print(f'\n{row["method"]}, 1-shot: % of the wrong answers within the group\n')
        print('| true | ' + ' | '.join(KINDS) + ' |\n' + '| --- ' * 6 + '|')
        for name, values in zip(KINDS, share):
            print(f'| {name} | ' + ' | '.join(f'{value:.0f}' for value in values) + ' |')


# ---- Where it looks

def gaze(model, seen):
    """What CLIP shows of videos, each level's (V, T, 1+L, D) -> the share of its attention that each level gives to each frame,
    (V, levels, T), the mean over heads; each video alone."""
    q, found = model.query.expand(len(seen[0]), -1), []
    for level, a in zip(model.levels, model.kept(seen)):
        tokens = level.tokens(a)  # (V, T*L, D)
        weights = level.frame_attn.folded_weights(level.ln_frame(q), tokens, level.ln_tokens)  # (V, heads, T*L)
        found.append(weights.mean(1).unflatten(1, (a.shape[1], -1)).sum(2))
        q = level.cross_frame(q, tokens)
        if model.cross_video:
            q = level.cross_video(q[:, None], None)[:, 0]
    return torch.stack(found, 1)


# ---- Linear probes: fitted on the videos of training motions, tested on those of others

def probe(x, labels, held, held_labels, penalty=300.0):
    """Ridge regression of one-hot labels: features (n, D) and labels (n, tasks) -> the share of right answers on (m, D) and
    (m, tasks), the mean over the tasks."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, held = ((part - mean) / std for part in (x, held))
    targets = [torch.nn.functional.one_hot(label).double() for label in labels.T]
    centre = torch.cat(targets, 1).mean(0)
    gram = x @ x.T + penalty * torch.eye(len(x), dtype=x.dtype)
    weight = torch.linalg.solve(gram, torch.cat(targets, 1) - centre)  # the dual, (n, classes of all tasks)
    answers = (held @ (x.T @ weight) + centre).split([target.shape[1] for target in targets], 1)
    right = [(answer.argmax(1) == label).double().mean() for answer, label in zip(answers, held_labels.T)]
    return 100 * torch.stack(right).mean().item()


@torch.no_grad()
def read(config, clip, model, split):
    """What of each video is probed, {name: (V, D) float64}; where VBA looks (V, levels, T); the videos' classes."""
    def make(seen):
        kept = encoding.videos(config, model, seen[1:])
        alone = Episode(torch.zeros(0, dtype=torch.int64), torch.zeros(len(kept[0]), 1, dtype=torch.int64), [], joint=False)
        answer = model.features([x.float() for x in kept], alone).flatten(1)
        patches = torch.stack([x.mean(2) for x in model.kept([x.float() for x in seen[1:]])], 1)
        return [seen[0].flatten(1).float(), patches.flatten(1).float(), kept[0].flatten(1), answer,
                gaze(model, [x.float() for x in seen[1:]])]

    reader = ClipReader(config, clip.visual.image_size)
    try:
        kept = encoding.keep(config, clip, split, reader, ('image', *model.sees), make, ['probes', config['ckpt']])
    finally:
        reader.close()
    names = ("CLIP's frame features, in order", 'mean patch of each frame and level, in order', 'Q*_0', 'Q_S, the answer')
    *probed, looks = (x[kept.rows].double() for x in kept.tensors)
    return dict(zip(names, probed)), looks, [split.classes[i] for i in kept.split.labels]


def probes(config, clip, model, splits):
    """Prints where VBA looks on the test's videos, and what linear probes read off each stage: the net change (mean over the
    channels) and the kind of corner."""
    train, _, train_names = read(config, clip, model, splits['train'])
    test, looks, test_names = read(config, clip, model, splits['test'])
    print('\n| % of the attention | ' + ' | '.join(f'frame {t}' for t in range(looks.shape[2])) + ' |')
    print('| --- ' * (1 + looks.shape[2]) + '|')
    for i, shares in enumerate(looks.mean(0)):
        print(f'| level {i} | ' + ' | '.join(f'{100 * share:.0f}' for share in shares) + ' |')
    print('\n| % right, a linear probe of | net change: less, none, more of a channel | kind of corner |\n| --- | --- | --- |')
    nets, held_nets = (torch.tensor([changes(name).tolist() for name in names]) for names in (train_names, test_names))
    kinds, held_kinds = (torch.tensor([[kind(name)] for name in names]) for names in (train_names, test_names))
    two, held_two = kinds[:, 0] >= 0, held_kinds[:, 0] >= 0
    most = 100 * torch.stack([(labels == labels.mode()[0]).double().mean() for labels in held_nets.T]).mean()
    print(f'| nothing: the most common answer | {most:.0f} | 20 |')
    for stage, x in train.items():
        net = probe(x, nets, test[stage], held_nets)
        corner = probe(x[two], kinds[two], test[stage][held_two], held_kinds[held_two])
        print(f'| {stage}, {x.shape[1]} numbers | {net:.0f} | {corner:.0f} |')


def fewer(n):
    """The demo's config with each n-th group of training motions, as the text of a file."""
    config = read_sample(SAMPLE)
    config['splits']['train'] = config['splits']['train'][::n]
    return 'config = dict(\n' + ''.join(f'    {key}={value!r},\n' for key, value in config.items()) + ')\n'


def main():
    if any(argument.startswith('--fewer=') for argument in sys.argv):
        print(fewer(load_config(sys.argv[1:], OPTIONS)['fewer']), end='')
        return
    config, ((path, saved, own),) = checkpoint.configure(sys.argv[1:], OPTIONS)
    resolve(own)
    mistakes(os.path.join(os.path.dirname(path), 'results.json'))
    clip = checkpoint.load_clip(own)
    model = checkpoint.rebuild(own, clip, saved, path)
    if not isinstance(model, VBA):
        sys.exit(f'{path} is of method={own["method"]}, not of VBA.')
    clip.to(own['device'])
    probes(own, clip, model, data.load_splits(own))


if __name__ == '__main__':
    main()
