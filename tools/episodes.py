"""The file of `eval.py --episodes_file`: a test's episodes by the names of their videos, for others to test on the same."""

import json
import sys

import numpy as np

import checkpoint
import testing


def load(path, videos):
    """The lists that `save` wrote, {(way, shot, queries): indices into videos.videos}."""
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


def save(path, videos, lists):
    """JSON, dict(videos=[name, ...], lists=[dict(way=, shot=, queries=, episodes=[[index of a name, ...], ...]), ...])."""
    checkpoint.save_json(path, dict(videos=testing.names_of(videos), lists=[
        dict(way=way, shot=shot, queries=queries, episodes=episodes.tolist())
        for (way, shot, queries), episodes in lists.items()]))
