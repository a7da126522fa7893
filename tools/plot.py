"""Several runs in one picture: loss and training accuracy over the steps, and a table of their tests.

    python tools/plot.py runs/* --out=runs.png
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from testing import line  # noqa: E402
from tools import pictures  # noqa: E402

POINTS = 200  # of a curve, each the mean of as many log lines as it takes


def entries_of(folder):
    """The log of a run -> dict(iter=, loss=, accuracy=), lists of at most POINTS numbers."""
    with open(os.path.join(folder, 'log.jsonl'), encoding='utf-8') as file:
        entries = [json.loads(text) for text in file if text.endswith('\n')]  # the last line may be half written
    parts = np.array_split(np.arange(len(entries)), min(POINTS, len(entries)) or 1)
    return {key: [np.mean([entries[i][key] for i in part]) for part in parts if len(part)]
            for key in ('iter', 'loss', 'accuracy')}


def main():
    options = [arg for arg in sys.argv[1:] if arg.startswith('--')]
    folders = [arg for arg in sys.argv[1:] if os.path.exists(os.path.join(arg, 'log.jsonl'))]
    if not folders or any(not option.startswith('--out=') for option in options):
        sys.exit(f'{__doc__}\nNone of these is a folder of train.py with a log.jsonl: {" ".join(sys.argv[1:])}')
    out = options[-1].removeprefix('--out=') if options else 'runs.png'
    names = pictures.readable([os.path.basename(os.path.normpath(folder)) for folder in folders])
    figure, (left, right) = pictures.plt.subplots(1, 2, figsize=(11, 4))
    for folder, name in zip(folders, names):
        entries = entries_of(folder)
        left.plot(entries['iter'], entries['loss'], label=name)
        right.plot(entries['iter'], entries['accuracy'], label=name)
        results = os.path.join(folder, 'results.json')
        print(name + ('' if os.path.exists(results) else ': no results.json, its test has not ended'))
        if os.path.exists(results):
            with open(results, encoding='utf-8') as file:
                print(*(f'  {line(row)}' for row in json.load(file) if row['checkpoint']), sep='\n')
    left.set(xlabel='step', ylabel='loss', yscale='log')
    right.set(xlabel='step', ylabel='training accuracy, %', ylim=(0, 100))
    right.legend(loc='center left', bbox_to_anchor=(1, 0.5))
    try:
        pictures.save(figure, out)
    except OSError as error:
        sys.exit(f'Cannot write {out}: {error.strerror}.')
    print(f'wrote {out}')


if __name__ == '__main__':
    main()
