"""What training and testing draw, as PNG files: the curve of a run, a confusion matrix, a clip's attention."""

import json
import os

import matplotlib
import numpy as np

matplotlib.use('Agg')  # no screen needed
import matplotlib.pyplot as plt  # noqa: E402


def save(figure, path):
    figure.savefig(path + '.tmp', format='png', dpi=120, bbox_inches='tight')
    os.replace(path + '.tmp', path)
    plt.close(figure)


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
    counts, names = np.array(row['confusion'], float), row['classes']
    size = 2.5 + 0.3 * len(names)
    figure, axes = plt.subplots(figsize=(size + 1, size))
    image = axes.imshow(100 * counts / np.maximum(counts.sum(1, keepdims=True), 1), vmin=0, vmax=100, cmap='Blues')
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel='answered', ylabel='true', title=f'{row["method"]}, {row["shot"]}-shot, {row["accuracy"]:.1f} %')
    figure.colorbar(image, label="% of the class's queries", fraction=0.046)
    save(figure, path)


def attention(frames, weights, scores, path):
    """One clip's frames (T, 3, H, W) uint8 above each level's attention, a list of (T, grid, grid), and scores by class."""
    levels, count = len(weights), len(frames)
    figure = plt.figure(figsize=(1.3 * count + 3.4, 1.3 * (levels + 1)))
    grid = figure.add_gridspec(levels + 1, count + 3, wspace=0.05, hspace=0.05)
    pictures = frames.permute(0, 2, 3, 1).numpy()
    height, width = pictures.shape[1:3]
    for t in range(count):
        axes = figure.add_subplot(grid[0, t])
        axes.imshow(pictures[t])
        axes.set_axis_off()
    top = max(float(w.max()) for w in weights)
    for level, weight in enumerate(weights, 1):
        for t in range(count):
            axes = figure.add_subplot(grid[level, t])
            axes.imshow(pictures[t].mean(-1), cmap='gray', alpha=0.4)
            image = axes.imshow(weight[t], extent=(0, width, height, 0), vmin=0, vmax=top, cmap='inferno', alpha=0.75,
                                interpolation='bilinear')
            axes.set_xticks([])
            axes.set_yticks([])
            if t == 0:
                axes.set_ylabel(f'level {level - 1}')
    bar = figure.add_axes((grid[0, count].get_position(figure).x0 + 0.01, 0.12, 0.012, 0.55))
    figure.colorbar(image, cax=bar, label='attention')
    axes = figure.add_subplot(grid[:, count + 2])
    best = sorted(scores.items(), key=lambda item: item[1])[-8:]
    axes.barh(range(len(best)), [score for _, score in best])
    axes.set_yticks(range(len(best)), [name for name, _ in best])
    axes.yaxis.tick_right()
    axes.set(xlim=(0, 1), xlabel='score')
    save(figure, path)
