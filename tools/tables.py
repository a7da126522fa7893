"""What the rows of a test tell together: trainings with several seeds, paired differences, and which classes are mistaken.

A row is a dict as `testing.evaluate` makes them, with it which queries were right.
"""

import itertools
import json
import os
import sys

import numpy as np

import checkpoint
import testing
from data import UNSEEN


def recipe(config):
    """All options of a training but the seed, as one text."""
    return json.dumps([config[key] for key in checkpoint.training_options(config) if key != 'seed'])


def together(rows, rights, recipes):
    """Rows of checkpoints that differ by their seeds alone -> one more row for each method and size: the mean accuracy, its
    interval over episodes for these very checkpoints, and `spread`, the standard deviation from one checkpoint to the next.

    recipes: for each checkpoint what `recipe` gives.
    """
    groups, found = {}, []
    for row, right in zip(rows, rights):
        if row['checkpoint']:
            groups.setdefault((row['method'], row['episodes_hash'], recipes[row['checkpoint']]), []).append((row, right))
    for group in groups.values():
        if len(group) < 2:
            continue
        mean = np.mean([right for _, right in group], 0)  # (episodes, M)
        first = {key: value for key, value in group[0][0].items() if key not in ('top5', 'top5_ci95', 'class_mean')}
        spread = float(np.std([row['accuracy'] for row, _ in group], ddof=1))
        found.append({**first, **testing.accuracies(mean, 'within' in group[0][0]), 'spread': spread,
                      'checkpoint': [row['checkpoint'] for row, _ in group], 'seconds': sum(row['seconds'] for row, _ in group),
                      'confusion': np.sum([row['confusion'] for row, _ in group], 0).tolist(), 'per_class': None})
        print(testing.line(found[-1]), flush=True)
    return found


def size_of(row):
    """What a row answers, in words."""
    if 'views' not in row:
        return f'{row["shot"]}-shot'
    return 'unseen classes' if row['split'] == UNSEEN else 'closed set'


def print_pairs(rows, rights):
    """Differences between methods on the same episodes: their interval is far tighter than two intervals compared. A probe is
    compared with its own method alone."""
    for (row, right), (other, base) in itertools.combinations(zip(rows, rights), 2):
        probe = 'queries' in row['method'] + other['method']
        own = other['method'].startswith(row['method'] + ',') and row['checkpoint'] == other['checkpoint']
        if row['episodes_hash'] != other['episodes_hash'] or (probe and not own):
            continue
        less = testing.accuracies(base.astype(int) - right, 'within' in row)
        groups = ''.join(f', {part} groups {less[part]:+.2f} ± {less[part + "_ci95"]:.2f}' for part in ('within', 'across')
                         if part in less)
        print(f'{row["way"]}-way {size_of(row)}  {title(other, rows)} - {title(row, rows)}: '
              f'{less["accuracy"]:+.2f} ± {less["ci95"]:.2f} points{groups} (paired)')


def title(row, rows):
    """A row's method, and its checkpoint where the table has several of this method."""
    several = len({other['checkpoint'] for other in rows if other['method'] == row['method']}) > 1
    return row['method'] + (f' ({os.path.relpath(row["checkpoint"])})' if several and row['checkpoint'] else '')


def print_mistakes(row, most=5):
    """The classes most often taken for another."""
    confusion = np.array(row['confusion'], float)
    share = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    np.fill_diagonal(share, 0)
    print(f'{row["method"]} {size_of(row)}, most often mistaken:')
    for true, guessed in list(zip(*np.unravel_index(np.argsort(-share, axis=None), share.shape)))[:most]:
        if share[true, guessed]:
            print(f'  {row["classes"][true]} for {row["classes"][guessed]}: {share[true, guessed]:.1f} % of its queries')


def warn_of_trained(found, split):
    """Says so where checkpoints of a closed set trained on videos of the split that is tested."""
    names = set(testing.names_of(split))
    for path, *_ in found:
        listed = os.path.join(os.path.dirname(path), 'train_videos.json')
        if os.path.exists(listed):
            with open(listed) as file:
                twice = names.intersection(json.load(file)['videos'])
            if twice:
                print(f'Warning: {path} trained on {len(twice)} of these {len(names)} videos.', file=sys.stderr, flush=True)
