"""The test: thousands of episodes from features encoded once, of any methods side by side.

    python eval.py sample_configs/diving48.py --ckpt=runs/diving48_vba/best.pt    a checkpoint
    python eval.py --ckpt='runs/diving48_*/best.pt'                               several, of one method or of many
    python eval.py sample_configs/diving48.py                                     the rows for which nothing is trained

In reading order: load_episodes, save_episodes; encode_all (every checkpoint); main. testing.py holds the test itself,
tools/tables.py what is told of its rows.
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
from tools import open_set, pictures, tables

OPTIONS = dict(
    ckpt=None,                 # a checkpoint, several as a list, or a pattern in quotes; None: the rows without training alone
    episodes_file=None,        # the test's episodes: read from this file if it is there, else written into it
    open_set=False,            # instead: are queries of other classes told from those of an episode's, and by which threshold
    probe=False,               # also test with the queries' frames reversed, shuffled, or the middle one repeated
)


def load_episodes(path, videos):
    """The lists that save_episodes wrote, {(way, shot, queries): indices into videos.videos}."""
    try:
        with open(path, encoding='utf-8') as file:
            saved = json.load(file)
        place = {name: i for i, name in enumerate(testing.names_of(videos))}
        if len(place) < len(videos.videos):
            sys.exit(f'{path} cannot be used: videos of one class in different folders have the same name.')
        missing = [name for name in saved['videos'] if name not in place]
        if missing:
            sys.exit(f'The episodes of {path} need {len(missing)} videos that cannot be read here, such as {missing[0]!r}.')
        order = np.array([place[name] for name in saved['videos']])
        lists = {(each['way'], each['shot'], each['queries']): order[np.array(each['episodes'])] for each in saved['lists']}
    except (OSError, ValueError, LookupError, TypeError) as error:
        sys.exit(f'{path} is no file of --episodes_file: {type(error).__name__}: {error}')
    group = {label: i for i, labels in enumerate(videos.groups) for label in labels}
    for (way, shot, _), episodes in lists.items():
        for number, classes in enumerate(testing.ways_of(videos, episodes, way, shot)[1] if group else ()):
            if len({group[label] for label in classes}) != (way if number % 2 else 1):
                sys.exit(f'{path} was not drawn by the groups that splits has now: episode {number} is not '
                         f'{"across groups" if number % 2 else "within one group"}.')
    return lists


def save_episodes(path, videos, lists):
    """JSON, dict(videos=[name, ...], lists=[dict(way=, shot=, queries=, episodes=[[index of a name, ...], ...]), ...])."""
    checkpoint.save_json(path, dict(videos=testing.names_of(videos), lists=[
        dict(way=way, shot=shot, queries=queries, episodes=episodes.tolist())
        for (way, shot, queries), episodes in lists.items()]))


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
        load_episodes(listed, split)  # stops here if it is none
    else:
        data.try_episodes(config, 'test', split)
    checkpoint.make_folder(config['out_dir'])
    tables.warn_of_trained(found, split)
    if config['open_set']:
        open_set.test(config, *((each, *encode_all(config, found, each)) for each in (splits['val'], split)))
        return ranks.end()
    tested, rows_of_videos = encode_all(config, found, split)
    readable = None if config['closed_set'] else subset(split, rows_of_videos)
    lists = load_episodes(listed, readable) if given else None
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
            save_episodes(listed, readable, used)
            print(f'wrote the episodes into {listed}')
        tables.print_pairs(rows[:len(rights)], rights)
        plain = [row for row in rows if ', queries' not in row['method']][-1]
        tables.print_mistakes(plain)
        pictures.confusion(plain, os.path.join(config['out_dir'], 'confusion.png'))
        print(f'wrote {path}')
    ranks.end()


if __name__ == '__main__':
    main()
