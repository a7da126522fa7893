"""The test: methods side by side on thousands of hashed episodes, from features encoded once. In reading order:

    draw_episodes, hash_of      which episodes
    Tested, untrained, encode   methods, and what they keep of the test's videos
    answers, validate           methods label queries
    lists_of, evaluate, line    the table
"""

import hashlib
import itertools
import math
import os
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import checkpoint
import data
import encoding
import ranks
from config import amp, name_of
from model import Episode

QUERY_BYTES = dict(cpu=2 ** 23, cuda=2 ** 28, mps=2 ** 28)  # that the episodes at a time may take: on a CPU it fits its caches
PROBES = ('reversed', 'still', 'shuffled')  # orders of frames that the queries of a test may be given


# ---- Episodes

def draw_episodes(videos, way, shot, queries, seed, count):
    """The `count` test episodes of a seed, (count, way * (shot + queries)) indices into videos.videos."""
    return np.stack([data.episode(videos, way, shot, queries, seed, i) for i in range(count)])


def names_of(videos):
    """Of each video of a split: its class, file, and where it is a part of a file, its first frame."""
    return [f'{videos.classes[c]}/{os.path.basename(v.path)}' + (f'@{v.start}' if v.start else '')
            for v, c in zip(videos.videos, videos.labels)]


def hash_of(videos, episodes):
    """Two people with the same hash tested on the same videos in the same episodes."""
    names = '\n'.join(names_of(videos)).encode(errors='surrogateescape')  # not all are UTF-8
    return hashlib.sha256(names + episodes.astype('<i8').tobytes()).hexdigest()[:16]


# ---- Methods

class Tested(NamedTuple):
    """A method in a test."""
    config: dict  # its own
    method: nn.Module
    weights_hash: str  # of its CLIP
    checkpoint: str | None = None  # its file; None: nothing is trained
    trained_on: str | None = None  # a data set
    tensors: list = ()  # what it keeps: (V * orders, ...), the orders of a video one after the other


def untrained(config, clip, names, more=()):
    """The rows of every table that nothing is trained for; more: methods that are among them if they need no training."""
    found = []
    rows = ([] if config['closed_set'] else ['mean_pool', 'concat', 'changes']) + (['zero_shot'] if clip.vocab_size else [])
    for name in dict.fromkeys((*rows, *more)):
        own = config | dict(method=name)
        if name in rows:
            own |= checkpoint.options_of(own)  # as it is by default, whatever the same name means to the method beside it
        try:
            method = checkpoint.build(own, clip, names)
        except SystemExit as error:
            print(f'no row {name}: {error}')
            continue
        if not any(p.requires_grad for p in method.parameters()):
            found.append(Tested(own, method, clip.weights_hash))
    return found


def orders_of(config):
    """The orders of frames that a test encodes: as they are, and with config['probe'] those of PROBES."""
    frames = list(range(config['frames']))
    if not config.get('probe'):
        return [frames]
    shuffled = np.random.default_rng(config['seed']).permutation(len(frames)).tolist()
    return [frames, frames[::-1], [len(frames) // 2] * len(frames), shuffled]


def encode(config, clip, tested, split, reader):
    """Encodes each view of each video of a split once, for all methods that see the same CLIP -> the same with tensors, rows as
    in Kept."""
    split = data.views(split, config['views'], config['crops'])
    sees = list(dict.fromkeys(what for each in tested for what in each.method.sees))
    orders, counts = orders_of(config), []
    for each in tested:
        each.method.eval()

    def make(seen):
        found = []
        for each in tested:
            own = [seen[sees.index(what)] for what in each.method.sees]
            by_order = [encoding.videos(config, each.method, [x[:, order] for x in own]) for order in orders]
            found.append([torch.stack(parts, 1) for parts in zip(*by_order)])  # each (n, orders, ...)
        counts[:] = map(len, found)  # the tensors of each method
        return sum(found, [])

    about = [orders, *(checkpoint.fingerprint(each.config, clip, each.method) for each in tested)]
    kept = encoding.keep(config, clip, split, reader, sees, make, about)
    tensors = (x.flatten(0, 1) for x in kept.tensors)
    return [each._replace(tensors=list(itertools.islice(tensors, n))) for each, n in zip(tested, counts)], kept.rows


@torch.no_grad()
def answers(config, method, tensors, index, labels, classes, names, joint, note, best=0):
    """Labels every query of every episode -> (count, M) int64, ways 0..N-1; with `best`, where queries are views of one video,
    the `best` ways of highest mean probability, the first one first (count, best).

    index (count, B), rows of `tensors`; labels (S,), classes (count, N) and names as in Episode. The episodes go some at a
    time; of several ranks each takes its share.
    """
    device, (rank, world) = config['device'], ranks.rank_of()
    index, labels, classes = (torch.from_numpy(x).to(device) for x in (index, labels, classes))
    count, videos = index.shape
    size = 4 * videos * sum(math.prod(x.shape[1:]) for x in tensors[:getattr(method, 'takes', None)])  # bytes of an episode
    if getattr(method, 'text', False):
        size += 4 * classes.shape[1] * tensors[0].shape[-1]  # and of the texts of its classes
    batch = int(np.clip(QUERY_BYTES[torch.device(device).type] // size, 1, -(-count // world)))
    found = torch.zeros(count, best or videos - len(labels), dtype=torch.int64, device=device)
    firsts = range(0, count, batch)[rank::world]
    for first in ranks.progress(firsts, note, len(firsts), unit_scale=batch, unit='episode'):
        part = slice(first, first + batch)
        try:
            with amp(config):
                scores = method.scores(tensors, Episode(labels, classes[part], names, joint, index=index[part]))
        except ValueError as error:  # of a name that it cannot read
            sys.exit(f'{note}: {error}')
        found[part] = scores.float().softmax(-1).mean(1).topk(best).indices if best else scores.argmax(-1)
    return ranks.add_up(found).cpu().numpy()


def ways_of(split, episodes, way=None, shot=0):
    """Labels (S,), classes (count, N) and right answers (count, M), ways 0..N-1, of episodes as `data.episode` draws them,
    class by class; without `way` of single videos (count, 1) among all classes of the split."""
    if way is None:
        return np.zeros(0, np.int64), np.tile(np.arange(len(split.classes)), (len(episodes), 1)), split.labels[episodes]
    answers = np.repeat(np.arange(way), episodes.shape[1] // way - shot)
    return np.repeat(np.arange(way), shot), split.labels[episodes[:, :way * shot:shot]], np.tile(answers, (len(episodes), 1))


def interval(values):
    """Mean and half-width of its 95 % interval, 1.96 * std / sqrt(n), of values (n,), in percent."""
    return 100 * values.mean(), 100 * 1.96 * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float('nan')


def accuracies(right, groups):
    """Accuracy and interval of right answers (count, M); where a split has groups, also those of the episodes within one group
    and across groups (see data.episode) -> dict(accuracy=, ci95=, within=, within_ci95=, across=, across_ci95=)."""
    parts = {'accuracy': right, **({'within': right[::2], 'across': right[1::2]} if groups else {})}
    found = {}
    for name, part in parts.items():
        found[name], found['ci95' if name == 'accuracy' else f'{name}_ci95'] = interval(part.mean(1))
    return found


def validate(config, method, kept, way, episodes):
    """Accuracy (a fraction) on a fixed list of 1-shot episodes of what CLIP shows of videos, a Kept; in a closed set (way None)
    of these videos themselves, `episodes` (V, 1)."""
    method.eval()
    tensors = encoding.videos(config, method, kept.tensors)
    labels, classes, right = ways_of(kept.split, episodes, way, 1)
    found = answers(config, method, tensors, kept.rows[episodes], labels, classes, kept.split.classes, True, 'validation')
    method.train()
    return (found == right).mean()


# ---- The table

def lists_of(config, split, given):
    """The test's episodes -> {(way, shot, queries): indices into split.videos (count, B)}, drawn by the seed if there are none
    `given`; of a closed set {(): each video alone, (V, 1)}."""
    if config['closed_set']:
        return {(): np.arange(len(split.videos))[:, None]}
    lists = {}
    for asked in data.sizes_of(config, 'test', split):
        way, shot, queries = sizes = data.fit_episode(config, split, *asked)
        if given and sizes not in given:
            sys.exit(f'{config["episodes_file"]} has no {way}-way {shot}-shot episodes with {queries} queries a class, only '
                     + ', '.join(map(str, given)) + ' (way, shot, queries).')
        lists[sizes] = given[sizes] if given else draw_episodes(split, *sizes, config['seed'], config['test_episodes'])
    return lists


def asked_of(config, each):
    """The rows of a Tested -> [(name, whether queries see each other, the queries' place in `orders_of`), ...]."""
    name, probes = name_of(each.config['method']), PROBES if config.get('probe') else ()
    joint = getattr(each.method, 'transductive', False) and not config['closed_set']
    first = f'{name} joint' if joint else name
    rows = [(first, joint, 0)] + [(f'{first}, queries {probe}', joint, i) for i, probe in enumerate(probes, 1)]
    return rows + [(f'{name} inductive', False, 0)] if joint else rows


def evaluate(config, tested, split, rows_of_views, lists=None):
    """The table: every method on the same episodes of a split's videos, for each of test_ways and test_shots; in a closed set
    on each video among all classes, the answers to its views averaged.

    rows_of_views: which views, as data.views lists them, could be read, and lie there in the methods' tensors; lists: {(way,
    shot, queries): episodes} to use. Returns the rows, a list of dicts as results.json holds them; for each row which queries
    were right, (episodes, M); and the lists.
    """
    closed, views, orders = config['closed_set'], config['views'] * config['crops'], len(orders_of(config))
    whole = np.flatnonzero(np.bincount(rows_of_views // views) == views)  # videos all of whose views could be read
    missing, split = len(split.videos) - len(whole), encoding.subset(split, whole)
    rows, rights, lists = [], [], lists_of(config, split, lists)
    for sizes, episodes in lists.items():
        labels, classes, ways = ways_of(split, episodes, *sizes[:2])
        seen = (whole[episodes][..., None] * views + np.arange(views)).reshape(len(episodes), -1)
        about = dict(episodes=len(episodes), episodes_hash=hash_of(split, episodes), missing=missing)
        for each in tested:
            if closed and not getattr(each.method, 'text', False) and each.method.names != split.classes:
                print(f'no row {name_of(each.config["method"])}: it answers with the classes that it was trained on alone.')
                continue
            for name, joint, order in asked_of(config, each):
                began, index = time.time(), seen * orders
                index[:, len(labels):] += order
                found = answers(config, each.method, each.tensors, index, labels, classes, split.classes, joint, name,
                                best=min(5, len(split.classes)) if closed else 0)
                true, guessed = (np.take_along_axis(classes, x, 1) for x in (ways, found))
                right = guessed[:, :true.shape[1]] == true
                rows.append(about | row_of(config, each, name, split, sizes, true, guessed, right)
                            | dict(transductive=joint, seconds=time.time() - began))
                rights.append(right)
                print(line(rows[-1]), flush=True)
    return rows, rights, lists


def row_of(config, each, name, split, sizes, true, guessed, right):
    """What a row says: of a Tested; of the classes of its queries (count, M), those that it gives them and whether these are
    right. In a closed set also top5, whose class is among the best that it gives, and class_mean, the mean over classes."""
    confusion = np.zeros((len(split.classes),) * 2, int)
    np.add.at(confusion, (true, guessed[:, :true.shape[1]]), 1)
    per_class = [100 * right[true == c].mean() if (true == c).any() else None for c in range(len(split.classes))]
    row = dict(
        method=name, checkpoint=each.checkpoint, dataset=config['dataset'], split=split.name, sampling=config['test_sampling'],
        seed=config['seed'], videos=len(split.videos), classes=split.classes, text=getattr(each.method, 'text', False),
        tuned='pixels' in each.method.sees, parameters=sum(p.numel() for p in each.method.parameters() if p.requires_grad),
        frames=each.config['frames'], backbone=os.path.basename(each.config['clip']), weights_hash=each.weights_hash,
        trained_on=each.trained_on, train_shot=each.config['shot'] if each.checkpoint else None,
        selection='val' if each.checkpoint else None, confusion=confusion.tolist(), per_class=per_class,
        **accuracies(right, split.groups))
    if sizes:
        return row | dict(zip(('way', 'shot', 'queries'), sizes))
    top5, top5_ci95 = interval((guessed == true).any(1))
    return row | dict(
        way=len(split.classes), shot=each.config['per_class'] if each.checkpoint else 0, queries=1,
        views=config['views'] * config['crops'], top5=top5, top5_ci95=top5_ci95,
        class_mean=float(np.mean([x for x in per_class if x is not None])))


def line(row):
    """One row of the table, for people."""
    runs = f' ({len(row["checkpoint"])} checkpoints, spread {row["spread"]:.2f})' if 'spread' in row else ''
    if 'views' in row:
        top5 = f'   top-5 {row["top5"]:6.2f} ± {row["top5_ci95"]:.2f} %, mean over classes {row["class_mean"]:.2f} %'
        return (f'{row["dataset"]} {row["split"]}  {row["way"]}-way  {row["method"]:15} top-1 {row["accuracy"]:6.2f} ± '
                f'{row["ci95"]:.2f} %{runs or top5}   {row["episodes"]} videos ({row["episodes_hash"]}), '
                f'views: {row["views"]}, {row["seconds"]:.1f} s')
    groups = ''
    if 'within' in row:
        groups = ', '.join(f'{part} groups {row[part]:.2f} ± {row[part + "_ci95"]:.2f}' for part in ('within', 'across'))
    return (f'{row["dataset"]} {row["split"]}  {row["way"]}-way {row["shot"]}-shot  {row["method"]:15} '
            f'{row["accuracy"]:6.2f} ± {row["ci95"]:.2f} %{runs}   {groups + "   " if groups else ""}'
            f'{row["episodes"]} episodes ({row["episodes_hash"]}), '
            f'{row["queries"]} query a class, {"transductive" if row["transductive"] else "inductive"}, {row["seconds"]:.1f} s')
