"""Does a method tell what it was not shown? What `eval.py --open_set=True` does instead of the usual test.

Half of the queries of an episode are of its classes, half of as many other classes of the split. A query counts as known where
the raw score of its best class, before any softmax, reaches a threshold: the one that 5 % of the known queries of the
validation classes fall below. That is what `predict.py --unknown=<threshold>` takes.

The raw score, not its lead over the second class, nor the softmax: these depend on which and how many the other classes are,
and so a threshold found on 5 ways would mean something else on 3 or 20. Where an episode's videos see each other, or its scores
are shares among its classes (clip_fsar, ts_fsar, vba_frames with a fixed matrix), it holds for as many ways and shots alone;
that of matching for as many shots.

In reading order: draw, best_scores (queries and their scores), auroc, test.
"""

import dataclasses
import os
import sys

import numpy as np
import torch

import checkpoint
import ranks
import testing
from config import amp, name_of
from encoding import subset
from model import Episode

FALSE_ALARMS = 0.05  # share of known queries that are called unknown
EPISODES = 16  # at a time


def draw(split, way, shot, queries, seed, count):
    """`count` episodes (count, way * shot + 2 * way * queries), indices into split.videos: supports of `way` classes, their
    queries, then those of as many other classes."""
    both = testing.draw_episodes(split, 2 * way, shot, queries, seed, count)
    return np.concatenate([both[:, :way * shot], both[:, 2 * way * shot:]], 1)


@torch.no_grad()
def best_scores(config, each, split, rows, episodes, way, shot):
    """A Tested and episodes of `draw` -> the raw score of each query's best class, (count, 2 * way * queries)."""
    labels = torch.arange(way, device=config['device']).repeat_interleave(shot)
    classes = torch.from_numpy(split.labels[episodes[:, :way * shot:shot]]).to(config['device'])
    index = torch.from_numpy(rows[episodes] * len(testing.orders_of(config))).to(config['device'])
    found = []
    for part in ranks.progress(range(0, len(index), EPISODES), name_of(each.config['method']), -(-len(index) // EPISODES)):
        part = slice(part, part + EPISODES)
        with amp(config):
            scores = each.method.scores(each.tensors, Episode(labels, classes[part], split.classes, False, index=index[part]))
        found.append(scores.float().amax(-1).cpu())
    return torch.cat(found).numpy()


def auroc(known, unknown):
    """The share of pairs of a known and an unknown query in which the known one's score is higher; equal ones count half."""
    unknown = np.sort(unknown)
    return (np.searchsorted(unknown, known, 'left') + np.searchsorted(unknown, known, 'right')).mean() / 2 / len(unknown)


def pairs(some, others):
    """Lists of Tested of one split and of another -> those of the same method; one may not be able to answer both."""
    known = {(name_of(each.config['method']), each.checkpoint): each for each in some}
    keys = [(name_of(each.config['method']), each.checkpoint) for each in others]
    return [(known[key], each) for key, each in zip(keys, others) if key in known]


def test(config, val, test):
    """val, test: (Split, its Tested, which of its videos could be read). Prints a line a method and number of shots, and writes
    them into open_set.json in out_dir."""
    found, sides = [], []
    for split, tested, rows in (val, test):  # any class may be unknown beside any other: no groups
        sides.append((dataclasses.replace(subset(split, rows), groups=[]), tested, rows))
    way = min(config['way'], *(len(split.classes) // 2 for split, *_ in sides))
    if way < 1:
        sys.exit('open_set: validation and test need two classes or more each.')
    for shot in config['test_shots']:
        drawn = [draw(split, way, shot, config['test_queries'], config['seed'], config['test_episodes']) for split, *_ in sides]
        for pair in pairs(*(tested for _, tested, _ in sides)):
            scores = [best_scores(config, each, split, rows, episodes, way, shot)
                      for each, (split, _, rows), episodes in zip(pair, sides, drawn)]
            (known, _), (test_known, unknown) = [np.split(part, 2, axis=1) for part in scores]
            threshold = np.quantile(known, FALSE_ALARMS)
            found.append(dict(
                method=name_of(pair[1].config['method']), checkpoint=pair[1].checkpoint, way=way, shot=shot,
                episodes=len(drawn[1]), auroc=100 * auroc(test_known.ravel(), unknown.ravel()), threshold=float(threshold),
                known_refused=100 * float((test_known < threshold).mean()),
                unknown_refused=100 * float((unknown < threshold).mean())))
            print('{way}-way {shot}-shot  {method:15} AUROC {auroc:6.2f} %   --unknown={threshold:.4g} refuses '
                  '{known_refused:.1f} % of the known, {unknown_refused:.1f} % of the unknown'.format(**found[-1]), flush=True)
    if ranks.rank_of()[0] == 0:
        checkpoint.save_json(os.path.join(config['out_dir'], 'open_set.json'), found)
