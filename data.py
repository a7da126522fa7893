"""From annotation lists to episodes; as a script it checks them, before you train.

    python data.py sample_configs/diving48.py [--key=value ...]

In reading order:

    Split, load_splits                 which videos there are, their classes, and which classes train, validate and test
    closed_set                         splits of videos instead of classes
    read_annotations, finder           lists (tools/lists.py reads them), and the files that they mean
    episode, fit_episode, shuffled     the N-way K-shot sampler, and that of single videos
    views                              of test videos, several
    verdict_file, read_verdicts        what tools/check.py found

decode.py turns a video into frames, reader.py turns episodes of videos into batches of clips.
"""

import dataclasses
import difflib
import errno
import functools
import glob
import itertools
import json
import os
import random
import re
import sys
import zlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from decode import IMAGES, VIDEOS, Video, stamp
from tools.fetch import prepare
from tools.lists import read_list

SPLITS = ('train', 'val', 'test')
UNSEEN = 'unseen'  # beside these in a closed set: the videos of the classes that it leaves out


# ---- Which videos there are

@dataclass(frozen=True)
class Split:
    """The videos of some classes: videos[i] is of class classes[labels[i]]; labels int64. groups: of classes that are hard to
    tell apart, a list of lists of labels."""
    name: str
    classes: list
    videos: list
    labels: np.ndarray
    groups: list = ()

    @cached_property
    def members(self):
        """For each class the indices of its videos."""
        return [np.flatnonzero(self.labels == label) for label in range(len(self.classes))]

    @property
    def most_ways(self):
        """The most classes that an episode can have."""
        return min(len(self.groups), *map(len, self.groups)) if self.groups else len(self.classes)


def load_splits(config):
    """The configuration -> dict(train=Split, val=Split, test=Split). Stops with one sentence where the data does not fit.

    Videos that are listed but not on the disk, or that the check found unreadable, are left out and counted.
    """
    verdicts, splits = read_verdicts(config), {}
    for name, (classes, listed) in list_videos(config).items():
        there = [(label, video) for label, _, video in listed if video is not None]
        good = [(label, video) for label, video in there if not (verdicts and verdicts.get(stamp(video), [None])[-1])]
        if len(good) < len(listed):
            print(f'Split {name}: {len(listed)} videos listed, {len(listed) - len(there)} missing, {len(there) - len(good)} '
                  f'unreadable, {len(good)} used.', flush=True)
        empty = set(range(len(classes))) - {label for label, _ in good}
        if empty and (name == 'train' or not config['closed_set']):
            sys.exit(f'Class {classes[min(empty)]!r} of split {name} has no video: all that are listed are missing in '
                     f'{config["data_root"]} or unreadable.')
        labels = np.array([label for label, _ in good], np.int64)
        splits[name] = Split(name, classes, [video for _, video in good], labels,
                             [] if config['closed_set'] else groups_of(config, name))
    return splits


def list_videos(config):
    """-> for each split its classes and [(label, name in the list, Video, or None where it is not on the disk), ...]."""
    root = config['data_root'].rstrip('/')
    if unknown := set(config['splits'] or {}) - set(SPLITS):
        sys.exit(f'splits may hold train, val and test, not {", ".join(sorted(map(str, unknown)))}.')
    parts = list((config['splits'] or {}).values())
    if not all(isinstance(part, list) for part in parts) and not all(type(part) in (int, float) for part in parts):
        sys.exit(f'splits={config["splits"]!r}: name the classes of each in a list, or give a fraction for each.')
    if not os.path.isdir(root):
        prepare(config)
    if config['annotations'] is None:
        rows, names, loose = [], {}, []
        for folder, video in list_folders(root):
            if os.path.dirname(video.path) == root:
                loose.append(video.path)
                continue
            name = video.path[len(root) + 1:]
            above = re.split(r'[\\/]', name)[0]
            rows.append((folder, name, video, above if above in SPLITS else None))
        if loose:
            print(f'Warning: {root} holds {len(loose)} videos outside of class folders, such as {loose[0]}; left out.',
                  file=sys.stderr, flush=True)
        if not rows:
            sys.exit(f'{root} holds no videos: expected a folder per class of videos or folders of images.\n{config["fetch"]}')
    else:
        rows, names = read_annotations(config)
    # a video once, however many lists name it
    rows = {(plain(row[0]), row[2] or row[1], row[3] if config['closed_set'] else None): row for row in rows}
    by_class = {}  # plain name -> [(name, name in the list, Video or None, split of videos or None), ...]
    for row in sorted(rows.values(), key=lambda row: row[1]):
        by_class.setdefault(plain(row[0]), []).append(row)
    if config['closed_set']:
        return closed_set(config, by_class, names)
    return {split: gather(split, classes, by_class, names) for split, classes in split_classes(config, by_class).items()}


def closed_set(config, by_class, names):
    """-> as list_videos, where all classes of splits' train (None: all there are) train, and each split has videos of each.

    The unseen classes are those of splits' test, with all their videos.
    """
    if not all(isinstance(part, list) for part in (config['splits'] or {}).values()):
        sys.exit('splits: with closed_set=True holdout gives the shares; splits may only name classes.')
    parts = named(config['splits'] or {})
    if any(isinstance(rows[0][0], int) for rows in by_class.values()):
        sys.exit('annotations: a list gives numbers for the classes and none gives names: add one, such as classInd.txt.')
    classes = parts['train'] or [rows[0][0] for rows in by_class.values()]
    gather('train', classes, by_class, names)  # stops at a class that has no video
    told = {row[3] for rows in by_class.values() for row in rows} - {None}
    parted = {plain(name): divided(config, by_class[plain(name)], told) for name in classes}
    splits = {split: gather(split, classes, {key: rows[split] for key, rows in parted.items()}, names) for split in SPLITS}
    return splits | {UNSEEN: gather(UNSEEN, parts['test'], by_class, names)}


def divided(config, rows, told):
    """The rows of one class, of the splits that lists tell or of none -> dict(train=rows, val=rows, test=rows).

    told: the splits that lists tell of; for another `holdout` says which share of the training videos is held out. The names of
    the files say which ones, so that trainings with other seeds are tested on the same videos.
    """
    parts = {split: [row for row in rows if row[3] == split] for split in SPLITS}
    if not told:
        parts['train'] = rows
    listed = [row[1] for part in parts.values() for row in part]
    if len(set(listed)) < len(listed):
        sys.exit(f'annotations: {max(listed, key=listed.count)} stands in two splits; name the lists of one split alone.')
    train = sorted(parts['train'], key=lambda row: zlib.crc32(os.path.basename(row[1]).encode(errors='surrogateescape')))
    for split, share in config['holdout'].items():
        if split not in told:
            count = round(share * len(parts['train']))
            parts[split], train = train[:count], train[count:]
    if config['per_class']:
        train = [row for row in train if row[2] is not None]  # what is missing is not drawn
        rng = np.random.default_rng([config['seed'], zlib.crc32(plain(rows[0][0]).encode())])
        train = [train[i] for i in rng.permutation(len(train))[:config['per_class']]]
    return parts | dict(train=sorted(train, key=lambda row: row[1]))


def gather(split, classes, by_class, names):
    """The classes' names, and their videos, class by class, sorted by name."""
    listed = []
    for label, name in enumerate(classes):
        if plain(name) not in by_class:
            near = [by_class[key][0][0] for key in difflib.get_close_matches(plain(name), by_class, 3, 0.5)]
            sys.exit(f'Class {name!r} of split {split} has no video; ' + (f'near names: {", ".join(map(repr, near))}.' if near
                     else f'the data has {len(by_class)} classes, such as {next(iter(by_class.values()))[0][0]!r}.'))
        listed += [(label, *row[1:3]) for row in by_class[plain(name)]]
    return [f'{name} {names[name]}' if name in names else str(name) for name in classes], listed


def list_folders(root, above=()):
    """Walks a folder -> [(class name, Video), ...]. A folder of images is one video; the class is the folder above a video.

    Below the first folder, one that cannot be read, or is a link to one `above` it, is warned of and left out.
    """
    folders, names, here = [], [], os.path.realpath(root)
    try:
        if here in above:
            raise OSError(errno.ELOOP, 'it links to a folder above it')
        for entry in os.scandir(root):
            is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()  # a looped link is none
            (folders if is_folder else names).append(entry.path)
    except OSError as error:
        if not above:
            sys.exit(f'Cannot read the folder {root}: {error.strerror}.')
        print(f'Warning: cannot read the folder {root}: {error.strerror}; left out.', file=sys.stderr, flush=True)
        return []
    videos = [path for path in names if path.lower().endswith(VIDEOS)]
    if not videos and any(path.lower().endswith(IMAGES) for path in names):
        return [(os.path.basename(os.path.dirname(root)), Video(root))]
    return ([(os.path.basename(root), Video(path)) for path in videos]
            + [item for folder in sorted(folders) for item in list_folders(folder, (*above, here))])


def plain(name):
    """Class names are the same if their letters and digits are."""
    return re.sub(r'[\W_]', '', str(name)).lower()


def split_classes(config, by_class):
    """-> dict(train=[class, ...], val=..., test=...), from lists, from fractions, or from folders of these names."""
    splits = config['splits']
    if splits is None:
        splits = {split: [rows[0][0] for rows in by_class.values() if split in {row[3] or row[1].split('/')[0] for row in rows}]
                  for split in SPLITS}
        if not splits['train']:
            sys.exit('splits is not set: name the classes, splits=dict(train=[...], val=[...], test=[...]), or give fractions, '
                     'splits=dict(train=0.6, val=0.2, test=0.2).')
    if not all(isinstance(part, list) for part in splits.values()):
        names = [by_class[key][0][0] for key in sorted(by_class)]
        random.Random(config['seed']).shuffle(names)
        if sum(splits.values()) > 1 + 1e-9:
            sys.exit(f'splits: the fractions add up to {sum(splits.values()):g}, more than 1.')
        sizes = {split: max(2, round(part * len(names))) for split, part in splits.items() if part}  # 2 make an episode
        rest = len(names) - sum(size for split, size in sizes.items() if split != 'train')
        if rest < 2:
            sys.exit(f'{config["data_root"]} has {len(names)} classes, too few for {len(sizes)} splits: each needs 2.')
        sizes['train'] = min(sizes.get('train', 0), rest)
        splits = {split: sorted(names.pop() for _ in range(sizes.get(split, 0))) for split in SPLITS}
        for split, dealt in splits.items():
            print(f'Split {split}, {len(dealt)} classes: {", ".join(map(str, dealt))}', flush=True)
    return named(splits)


def named(splits):
    """The splits of the configuration -> {split: class names}, of all three. Stops where a class stands twice."""
    found, seen = {split: flat(splits.get(split, [])) for split in SPLITS}, {}
    for split, names in found.items():
        for name in names:
            if plain(name) in seen:
                sys.exit(f'splits: class {name!r} stands in {seen[plain(name)]} and in {split}.')
            seen[plain(name)] = split
    return found


def flat(names):
    """The classes of a split as the configuration names them: a list of names, or of lists of names, its groups."""
    return [name for part in names for name in (part if isinstance(part, list) else [part])]


def groups_of(config, split):
    """The groups of a split as lists of labels; none where its classes are named one by one. Stops where only some have one."""
    parts = (config['splits'] or {}).get(split, [])
    if not isinstance(parts, list) or not any(isinstance(part, list) for part in parts):
        return []
    alone = [part for part in parts if not isinstance(part, list)]
    if alone:
        sys.exit(f'splits: {split} has groups of classes, but {alone[0]!r} stands in none: put it into a list.')
    ends = list(itertools.accumulate(map(len, parts), initial=0))
    return [list(range(first, end)) for first, end in itertools.pairwise(ends)]


# ---- From lists to files

def read_annotations(config):
    """-> rows [(class name or number, name in the list, Video or None, split of videos or None), ...] of all lists, and class
    names {number: name}."""
    lists = config['annotations'] if isinstance(config['annotations'], dict) else {None: config['annotations']}
    paths = [(of, path) for of, some in lists.items() for path in (some if isinstance(some, list) else [some])]
    for of, path in paths:
        if of not in (None, *SPLITS):
            sys.exit(f'annotations may hold lists of train, val and test, not of {of!r}.')
        if not glob.glob(path) and not os.path.exists(path):
            sys.exit(f'There is no {path}.\n{config["fetch"]}')
    listed, names, find = [], {}, finder(config['data_root'].rstrip('/'))
    for of, path in paths:
        files = sorted(glob.glob(os.path.join(glob.escape(path), '*') if os.path.isdir(path) else path)) or [path]
        for file in files:
            kind, rows, some = read_list(file, find)
            if len(files) < 9:
                print(f'{file}: {kind}' + (f', {len(rows)} videos:' if rows else ''), flush=True)
                for label, name, *_, split in rows[:3]:  # so that a wrong guess is seen
                    print(f'  {name} is of {label!r}' + (f', {split}' if split else ''), flush=True)
            listed += [(*row[:4], of or row[4]) for row in rows]
            names.update(some)
    splits = {split: flat(part) for split, part in (config['splits'] or {}).items() if isinstance(part, list)}
    wanted = {plain(name) for part in splits.values() for name in part}
    rows, unknown = [], []
    for label, name, start, end, of in listed:
        if isinstance(label, tuple):
            split, index = label
            if index >= len(splits.get(split, [])):
                sys.exit(f'{name} is of class {index} of split {split}, but splits names '
                         f'{len(splits[split]) if split in splits else "no"} classes there.')
            label = splits[split][index]
        path = find(name, label)
        if isinstance(label, int) and plain(label) not in wanted:  # a number where splits holds names
            folder = os.path.basename(os.path.dirname(path or name))
            label = names.get(label) or (folder if plain(folder) in wanted else None if wanted else label)
        if label is None:
            unknown.append(name)
        else:
            rows.append((label, name, path and Video(path, start, end), of))
    if unknown and not rows:
        sys.exit(f'{unknown[0]}: its list gives a number for the class and no list gives names: add one, such as classInd.txt.')
    return rows, names


def finder(root):
    """-> function (name in a list, class) -> path on the disk or None.

    With or without extension or folders before it; where several fit, the one in the class's folder. Kinetics clips are found
    with or without the times in their names.
    """
    by_name, by_stem = {}, {}
    for _, video in list_folders(root):
        name = bare(video.path[len(root) + 1:])
        by_name[name] = video.path
        for stem in {os.path.basename(name), timeless(os.path.basename(name))}:
            by_stem.setdefault(stem, []).append(video.path)

    def find(name, label):
        name = bare(name)
        stem = os.path.basename(name)
        found = by_name.get(name) or by_stem.get(stem) or by_stem.get(timeless(stem))
        if isinstance(found, list):
            folders = plain(label), plain(os.path.basename(os.path.dirname(name)))
            return min(found, key=lambda path: (plain(os.path.basename(os.path.dirname(path))) not in folders, path))
        return found

    return find


def bare(name):
    """A path without its extension, if that is a video's."""
    return os.path.splitext(name)[0] if name.lower().endswith(VIDEOS) else name


def timeless(stem):
    """A Kinetics clip's YouTube id."""
    return re.sub(r'(?<=^.{11})_\d{6}_\d{6}$', '', stem)


# ---- Episodes

def episode(split, way, shot, queries, seed, number):
    """Episode `number` of seed `seed` -> (way * (shot + queries),) int64, indices into split.videos.

    The supports first, class by class, then the queries, class by class; no video twice. Where the split has groups, the
    classes of an even number are of one group, those of an odd one of as many groups. A function of its arguments alone.
    """
    if not split.classes:
        sys.exit(f'Split {split.name} has no classes: name some for it in splits.')
    if split.most_ways < way:
        groups = f' in {len(split.groups)} groups, the smallest of {min(map(len, split.groups))}' if split.groups else ''
        sys.exit(f'Split {split.name} has {len(split.classes)} classes{groups}, too few for {way}-way episodes.')
    smallest = min(range(len(split.classes)), key=lambda label: len(split.members[label]))
    videos = len(split.members[smallest])
    if videos < shot + queries:
        sys.exit(f'Class {split.classes[smallest]!r} of split {split.name} has {videos} videos, too few for'
                 f' {shot} supports and {queries} queries: lower the shots or the queries, or leave the class out.')
    rng = np.random.default_rng([seed, number])
    if not split.groups:
        classes = rng.choice(len(split.classes), way, replace=False)
    elif number % 2 == 0:
        classes = rng.choice(split.groups[rng.integers(len(split.groups))], way, replace=False)
    else:
        classes = [rng.choice(split.groups[i]) for i in rng.choice(len(split.groups), way, replace=False)]
    drawn = np.stack([rng.choice(split.members[c], shot + queries, replace=False) for c in classes])
    return np.concatenate([drawn[:, :shot].ravel(), drawn[:, shot:].ravel()])


@functools.lru_cache(maxsize=2)
def permutation(count, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(count)


def shuffled(split, seed, number):
    """Video `number` of an endless stream in which each epoch has each video of the split once -> (1,) int64, an index into
    split.videos. A function of its arguments alone."""
    epoch, place = divmod(number, len(split.videos))
    return permutation(len(split.videos), seed, epoch)[[place]]


def views(split, count, crops):
    """The split with count * crops views of each video, one after the other: `count` clips, whose frames lie at other places of
    the T parts, each of `crops` crops along the longer side."""
    ways = [dict(at=(i + 0.5) / count, place=j / (crops - 1) if crops > 1 else 0.5) for i in range(count) for j in range(crops)]
    seen = [video._replace(**way) for video in split.videos for way in ways]
    return dataclasses.replace(split, videos=seen, labels=np.repeat(split.labels, len(ways)))


def fit_episode(config, split, way, shot, queries):
    """-> (way, shot, queries), lowered to what the split's classes hold where the configuration says `lower`, and says so."""
    smallest = min(map(len, split.members), default=0)
    if not config['lower'] or (way <= split.most_ways and shot + queries <= smallest):
        return way, shot, queries
    asked, way, shot = (way, shot, queries), min(way, split.most_ways), max(1, min(shot, smallest - 1))
    queries = min(queries, smallest - shot)
    if way < 2 or queries < 1:
        sys.exit(f'Split {split.name} is too small for any episode: it has {len(split.classes)} classes of {smallest} or more '
                 'videos, and needs 2 classes of 2.')
    print(f'Split {split.name} has {len(split.classes)} classes, the smallest of {smallest} videos: episodes are {way}-way '
          f'{shot}-shot with {queries} queries a class instead of {asked[0]}-way {asked[1]}-shot with {asked[2]}.', flush=True)
    return way, shot, queries


def sizes_of(config, use, split):
    """The episodes that are asked of a split used to 'train', as 'val' or as 'test' -> [(way, shot, queries), ...]."""
    if use == 'train':
        return [(config['way'], config['shot'], config['queries'])]
    if use == 'val':  # at least 2-way: 1-way is always right
        return [(max(2, min(config['way'], len(split.classes))), 1, config['test_queries'])]
    ways = config['test_ways'] or [config['way']]
    return [(way, shot, config['test_queries']) for way, shot in itertools.product(ways, config['test_shots'])]


def try_episodes(config, use, split):
    """The same as they can be drawn (see fit_episode); of a closed set [()]. Stops where one cannot be drawn, or a closed set's
    split is empty: before the videos are read, not after."""
    if config['closed_set']:
        if not split.videos:
            sys.exit(f'Split {split.name} has no video: raise its share in holdout, or list its videos in annotations.')
        return [()]
    found = [fit_episode(config, split, *sizes) for sizes in sizes_of(config, use, split)]
    for sizes in found:
        episode(split, *sizes, config['seed'], 0)
    return found


# ---- What tools/check.py found

def verdict_file(config):
    """Beside the videos or in cache_dir, so that training and testing find it."""
    cache = config['cache_dir']
    return os.path.join(cache, 'checked.jsonl') if cache else config['data_root'].rstrip('/') + '.checked.jsonl'


def read_verdicts(config):
    """Earlier checks -> {stamp of a video: (number of frames, what is wrong though it can be read, why it cannot be read)}."""
    verdicts = {}
    if os.path.exists(verdict_file(config)):
        with open(verdict_file(config), encoding='ascii') as file:
            for line in file:
                try:
                    key, *verdict = json.loads(line)
                    verdicts[tuple(key)] = verdict
                except ValueError:
                    pass  # half a line, where a check was killed
    return verdicts


if __name__ == '__main__':
    from tools import check
    check.main()
