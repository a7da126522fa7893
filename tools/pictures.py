"""What training and testing draw, as PNG files: the curve of a run, a confusion matrix."""

import json

import matplotlib
import numpy as np

matplotlib.use('Agg')  # no screen needed
import matplotlib.pyplot as plt  # noqa: E402

from checkpoint import whole  # noqa: E402
from tools.tables import size_of  # noqa: E402

POINTS = 200  # of a curve, each the mean of as many log lines as it takes


def save(figure, path):
    with whole(path, 'wb') as file:
        figure.savefig(file, format='png', dpi=120, bbox_inches='tight')
    plt.close(figure)


def readable(names):
    """Names as they can be drawn: of a file system that is not UTF-8 they may hold what is no character."""
    return [name.encode(errors='surrogateescape').decode(errors='replace') for name in names]


def curves(logs, path):
    """{name of a run: its log.jsonl} -> loss and accuracy on the training episodes over the steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
    for name, log in zip(readable(logs), logs.values()):
        with open(log, encoding='utf-8') as file:
            entries = [json.loads(text) for text in file if text.endswith('\n')]  # the last line may be half written
        parts = np.array_split(np.arange(len(entries)), min(POINTS, len(entries)) or 1)
        steps, losses, accuracies = ([np.mean([entries[i][key] for i in part]) for part in parts if len(part)]
                                     for key in ('iter', 'loss', 'accuracy'))
        left.plot(steps, losses)
        right.plot(steps, accuracies, label=name)
    left.set(xlabel='step', ylabel='loss', yscale='log')
    right.set(xlabel='step', ylabel='training accuracy, %', ylim=(0, 100))
    if len(logs) > 1:
        right.legend(loc='center left', bbox_to_anchor=(1, 0.5))
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
