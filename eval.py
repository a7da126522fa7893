"""The test: thousands of episodes from features encoded once, of any methods side by side.

    python eval.py sample_configs/diving48.py --ckpt=runs/diving48_vba/best.pt    a checkpoint
    python eval.py --ckpt='runs/diving48_*/best.pt'                               several, of one method or of many
    python eval.py sample_configs/diving48.py                                     the rows for which nothing is trained

In reading order: encode_all (every checkpoint), main. testing.py holds the test itself, tools/tables.py what is told of its
rows, tools/episodes.py the file of --episodes_file.
"""

import json
import os
import sys
from contextlib import closing
from functools import reduce

import numpy as np

import checkpoint
import data
import ranks
import testing
from config import LOOK, resolve
from encoding import subset
from reader import ClipReader
from tools import episodes, open_set, pictures, tables

OPTIONS = dict(
    ckpt=None,                 # a checkpoint, several as a list, or a pattern in quotes; None: the rows without training alone
    episodes_file=None,        # the test's episodes: read from this file if it is there, else written into it
    open_set=False,            # instead: are queries of other classes told from those of an episode's, and by which threshold
    probe=False,               # also test with the queries' frames reversed, shuffled, or the middle one repeated
)


def encode_all(config, found, split):
    """Encodes the split for all checkpoints, once for those that see the same -> tested, the rows of the videos that could be
    read. The rows without training see what the first one sees."""
    groups = {}
    for path, saved, own in found:
        groups.setdefault(json.dumps([own[key] for key in ('clip', *LOOK)]), []).append((path, saved, own))
    tested, rows = [], []
    for group in list(groups.values()) or [[]]:
        first = group[0][2] if group else config
        with ranks.rank_0_first():  # it fetches what is missing
            clip = checkpoint.load_clip(first)
            methods = [] if tested else testing.untrained(first, clip, split.classes, [config['method']] * (not found))
        for path, saved, own in group:
            method = checkpoint.rebuild(own, clip, saved, path)
            trained = {key: saved['config'][key] for key in ('shot', 'per_class')}
            methods.append(testing.Tested(own | trained, method, clip.weights_hash, path, saved['config']['dataset']))
        clip.to(config['device'])
        with closing(ClipReader(first, clip.visual.image_size)) as reader:
            methods, read = testing.encode(first, clip, methods, split, reader)
        tested += methods
        rows.append(read)
    return tested, reduce(np.intersect1d, rows)


def main():
    config, found = checkpoint.configure(sys.argv[1:], OPTIONS)
    if config['closed_set'] and config['episodes_file']:
        sys.exit('episodes_file: with closed_set=True there are no episodes; the hash tells the videos.')
    if config['open_set'] and (config['closed_set'] or config['episodes_file'] or config['probe']):
        sys.exit('open_set draws episodes of its own: not with closed_set, episodes_file or probe.')
    resolve(config)
    ranks.begin(config)
    found = [(path, saved, own | {key: config[key] for key in ('device', 'dtype')}) for path, saved, own in found]
    with ranks.rank_0_first():  # it makes or fetches what is missing
        splits = data.load_splits(config)
    split = splits[config['test_split']]
    listed = config['episodes_file']
    given = listed and os.path.exists(listed)
    if given:
        episodes.load(listed, split)  # stops here if it is none
    else:
        data.try_episodes(config, 'test', split)
    checkpoint.make_folder(config['out_dir'])
    tables.warn_of_trained(found, split)
    if config['open_set']:
        open_set.test(config, *((each, *encode_all(config, found, each)) for each in (splits['val'], split)))
        return ranks.end()
    tested, rows_of_videos = encode_all(config, found, split)
    readable = None if config['closed_set'] else subset(split, rows_of_videos)
    lists = episodes.load(listed, readable) if given else None
    rows, rights, used = testing.evaluate(config, tested, split, rows_of_videos, lists)
    if not rows:
        sys.exit('No method here can answer with these classes.')
    if ranks.rank_of()[0] == 0:
        rows += tables.together(rows, rights, {path: tables.recipe(saved['config']) for path, saved, _ in found})
        across = any(saved['config']['dataset'] != config['dataset'] for _, saved, _ in found)
        name = f'results_{config["dataset"]}.json' if across else 'results.json'
        if config['closed_set'] and not across:  # what training wrote has the unseen classes too
            name = f'results_{split.name}.json'
        path = os.path.join(config['out_dir'], name)
        checkpoint.save_json(path, rows)  # before anything that may go wrong
        if listed and not given:
            episodes.save(listed, readable, used)
            print(f'wrote the episodes into {listed}')
        tables.print_pairs(rows[:len(rights)], rights)
        plain = [row for row in rows if ', queries' not in row['method']][-1]
        tables.print_mistakes(plain)
        pictures.confusion(plain, os.path.join(config['out_dir'], 'confusion.png'))
        print(f'wrote {path}')
    ranks.end()


if __name__ == '__main__':
    main()
