"""What training and testing draw, as PNG files: the curve of a run, a confusion matrix."""

import json

import matplotlib
import numpy as np

matplotlib.use('Agg')  # no screen needed
import matplotlib.pyplot as plt  # noqa: E402

from checkpoint import whole  # noqa: E402
from testing import size_of  # noqa: E402


def save(figure, path):
    with whole(path, 'wb') as file:
        figure.savefig(file, format='png', dpi=120, bbox_inches='tight')
    plt.close(figure)


def readable(names):
    """Names as they can be drawn: of a file system that is not UTF-8 they may hold what is no character."""
    return [name.encode(errors='surrogateescape').decode(errors='replace') for name in names]


def curve(log, path):
    """A log.jsonl -> loss and accuracy on the training episodes over the steps."""
    with open(log) as file:
        entries = [json.loads(text) for text in file]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
    left.plot([e['iter'] for e in entries], [e['loss'] for e in entries])
    left.set(xlabel='step', ylabel='loss', yscale='log')
    right.plot([e['iter'] for e in entries], [e['accuracy'] for e in entries])
    right.set(xlabel='step', ylabel='training accuracy, %', ylim=(0, 100))
    save(figure, path)


def confusion(row, path):
    """A row of results.json -> its confusion matrix, each true class's queries adding up to 100 %."""
    counts, names = np.array(row['confusion'], float), readable(row['classes'])
    size = 2.5 + 0.3 * len(names)
    figure, axes = plt.subplots(figsize=(size + 1, size))
    image = axes.imshow(100 * counts / np.maximum(counts.sum(1, keepdims=True), 1), vmin=0, vmax=100, cmap='Blues')
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel='answered', ylabel='true', title=f'{row["method"]}, {size_of(row)}, {row["accuracy"]:.1f} %')
    figure.colorbar(image, label="% of the class's queries", fraction=0.046)
    save(figure, path)
