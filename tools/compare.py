"""Methods, or variants of one, trained in turn, as many steps each, over several seeds: the table, and paired differences.

    python tools/compare.py sample_configs/moving_shapes.py matrix vba 'vba --cross_video=False' my_idea.py --seeds=5

Each row is a method or its file, with options in quotes; other --key=value hold for all rows. What is trained already is not
trained again, what was interrupted goes on, so that rows and seeds may be added later.

In reading order: train_all (the trainings), table, differences (what they tell), main.
"""

import json
import math
import os
import re
import statistics
import subprocess
import sys
from multiprocessing.pool import ThreadPool

from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import checkpoint  # noqa: E402
from config import find_method, load_config, name_of  # noqa: E402
from tools import pictures  # noqa: E402
from tools.tables import size_of  # noqa: E402

OPTIONS = dict(
    seeds=1,                   # trainings of each row: with the seeds 0, 1, ...
    jobs=1,                    # trainings at a time, which share the processor's cores
    lrs=[0.0],                 # several: tried with seed 0, and each row without an --lr goes on with its best in validation
    out='',                    # a folder for the runs; '': runs/compare_<dataset>
)
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # 97.5 % of Student's t with 1, 2, ... degrees of freedom


def train_all(sample, rows, seeds, common, config):
    """Trains and tests every row with every seed -> {row: [the folder of each seed, ...]}.

    rows: {row: arguments of train.py}; common: arguments of all.
    """
    folder = config['out']
    threads, features = str(max(1, (os.cpu_count() or 1) // config['jobs'])), os.path.join(folder, 'features')

    def train(job):
        row, seed = job
        name = ' '.join([name_of(rows[row][0].partition('=')[2]), *rows[row][1:], *common])
        out_dir, ended = os.path.join(folder, re.sub(r'[^\w.-]+', '_', name.replace('--', '')) + f'_seed{seed}'), 0
        results = os.path.join(out_dir, 'results.json')
        if os.path.exists(results):
            newer = [path for path in (sample, find_method(rows[row][0].partition('=')[2])[1])
                     if os.path.getmtime(path) > os.path.getmtime(results)]
            if newer:
                tqdm.write(f'{out_dir} was trained before {", ".join(newer)} changed: delete it to train it again.')
        else:
            os.makedirs(out_dir, exist_ok=True)
            resume = os.path.exists(os.path.join(out_dir, 'last.pt'))
            command = [sys.executable, os.path.join(ROOT, 'train.py'), sample, *rows[row], *common, f'--seed={seed}',
                       f'--features_dir={features}', '--overwrite=True', f'--out_dir={out_dir}', f'--resume={resume}']
            with open(os.path.join(out_dir, 'output.txt'), 'a') as output:
                ended = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT,
                                       env={**os.environ, 'OMP_NUM_THREADS': threads}).returncode
        return row, out_dir, ended

    jobs, found = [(row, seed) for row in rows for seed in seeds], {row: [] for row in rows}
    with ThreadPool(config['jobs']) as pool:
        for row, out_dir, ended in tqdm(pool.imap(train, jobs), total=len(jobs), unit='training', disable=None):
            if ended:
                sys.exit(f'{row}: the training ended with exit status {ended}; {out_dir}/output.txt tells why.')
            found[row].append(out_dir)
    return found


def best_rates(sample, rows, common, config):
    """The rows with the learning rate of `lrs` that the validation classes, and they alone, find best."""
    trials, reached = {}, {}
    for row, arguments in rows.items():
        if '--lr=' not in row:
            trials |= {(row, lr): [*arguments, f'--lr={lr}'] for lr in config['lrs']}
    for trial, (folder,) in train_all(sample, trials, [0], common, config).items():
        saved = checkpoint.load(os.path.join(folder, 'best.pt'), trusted=trials[trial][0].partition('=')[2])
        reached[trial] = saved['state']['best']
    chosen = {}
    for row in rows:
        if '--lr=' in row:
            chosen[row] = rows[row]
            continue
        best = max((trial for trial in trials if trial[0] == row), key=reached.get)
        print(f'{row}: ' + ', '.join(f'lr={lr} {100 * reached[row, lr]:.1f} %' for lr in config['lrs']) + ' in validation')
        chosen[f'{row}, lr={best[1]}'] = trials[best]
    return chosen


def measures(results):
    """The column heads of results: what a row of results.json holds, and the size of its test."""
    parts = [part for part in ('within', 'across') if part in results[0]] or ['accuracy']
    return [(part, size) for size in dict.fromkeys(map(size_of, results)) for part in parts]


def inductive(runs, size):
    """Of each seed the row of what was trained, where queries do not see each other; [] where there is none of this size."""
    rows = [row for run in runs for row in run if size_of(row) == size]
    return [row for row in rows if row['checkpoint'] and not row['transductive'] and ', queries' not in row['method']]


def titles(heads):
    return ' | '.join(size + f', {part}' * (part != 'accuracy') for part, size in heads)


def protocol(row):
    """What must be the same for two rows to be compared as equals."""
    parts = ['CLIP tuned' if row.get('tuned') else 'frozen', *(key for key in ('text', 'transductive') if row[key])]
    if row['checkpoint'] and 'views' not in row:
        parts.append(f'trained {row["train_shot"]}-shot')
    return ', '.join(parts)


def table(found):
    """Markdown: each row's mean and standard deviation over the seeds; of what is not trained, the interval over episodes."""
    first = max((runs[0] for runs in found.values()), key=len)  # some have tests that others have not
    heads = measures(first)
    lines = [f'| | trained numbers | protocol | {titles(heads)} |', '| --- ' * (3 + len(heads)) + '|']
    rows = {name: [[row for row in first if row['method'] == name and not row['checkpoint']]]
            for name in dict.fromkeys(row['method'] for row in first if not row['checkpoint'])}
    for label, runs in found.items():
        trained = [[row for row in run if row['checkpoint']] for run in runs]
        for name in dict.fromkeys(row['method'] for row in trained[0]):
            mode = name.partition(' ')[2]
            rows[f'{label} {mode}'.strip()] = [[row for row in run if row['method'] == name] for run in trained]
    for label, runs in rows.items():
        about, cells = runs[0][0], []
        for part, size in heads:
            own = [row for run in runs for row in run if size_of(row) == size]
            values = [row[part] for row in own]
            if not values:  # it cannot answer this
                cells.append('')
                continue
            spread = own[0]['ci95' if part == 'accuracy' else f'{part}_ci95']
            if len(values) > 1:
                spread = statistics.stdev(values)
            cells.append(f'{statistics.mean(values):.1f} ± {spread:.1f}')
        lines.append(f'| {label} | {about["parameters"]:,} | {protocol(about)} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def differences(found):
    """Markdown: each row, inductive, less the first one, paired by seed, with the 95 % interval of the mean over seeds."""
    (base, base_runs), *others = found.items()
    heads = measures(base_runs[0])
    lines = [f'| less {base} | {titles(heads)} |', '| --- ' * (1 + len(heads)) + '|']

    for label, runs in others:
        cells = []
        for part, size in heads:
            less = [row[part] - other[part] for row, other in zip(inductive(runs, size), inductive(base_runs, size))]
            if not less:
                cells.append('')
                continue
            half = STUDENT[min(len(less), 10) - 2] * statistics.stdev(less) / math.sqrt(len(less))
            cells.append(f'{statistics.mean(less):+.1f} ± {half:.1f}')
        lines.append(f'| {label} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def draw(found, path):
    """Accuracy against trained numbers: each row's mean over the seeds, with its standard deviation."""
    heads = measures(max((runs[0] for runs in found.values()), key=len))
    figure, axes = pictures.plt.subplots(1, len(heads), figsize=(4 * len(heads), 3.5), squeeze=False)
    for (part, size), plot in zip(heads, axes[0]):
        for i, (label, runs) in enumerate(found.items()):
            own = inductive(runs, size)
            if not own:
                continue
            values, numbers = [row[part] for row in own], own[0]['parameters']
            mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
            plot.errorbar(numbers, mean, spread, fmt='osD^'[i % 4], color=f'C{i % 10}', capsize=3, label=label)
        plot.set(xscale='log', xlabel='trained numbers', ylabel='%' if plot is axes[0][0] else '', title=titles([(part, size)]))
    axes[0][0].legend(bbox_to_anchor=(0, -0.2), loc='upper left', ncols=6, fontsize=8)
    pictures.save(figure, path)


def main():
    sample, *rest = sys.argv[1:] or ['--help']
    own = [argument for argument in rest if argument.partition('=')[0][2:] in OPTIONS]
    common = [argument for argument in rest if argument.startswith('--') and argument not in own]
    rows = {}
    for text in (argument for argument in rest if not argument.startswith('--')):
        method, *options = text.split()
        rows[' '.join([name_of(method), *options])] = [f'--method={method}', *options]
    for arguments in rows.values() or [[]]:  # whatever is wrong with a row is told before the first one trains
        config = load_config([sample, *arguments, *common, *own], OPTIONS)
    if not rows:
        sys.exit('Name the rows after the config: methods, each with its options in quotes.')
    config['out'] = config['out'] or os.path.join(ROOT, 'runs', f'compare_{config["dataset"]}')
    if len(config['lrs']) > 1:
        rows = best_rates(sample, rows, common, config)
    found = {row: [] for row in rows}
    for row, folders in train_all(sample, rows, range(config['seeds']), common, config).items():
        for folder in folders:
            with open(os.path.join(folder, 'results.json')) as file:
                found[row].append(json.load(file))
    size = f'{config["test_episodes"]} episodes'
    if config['closed_set']:
        size = f'{config["per_class"] or "all"} training videos a class'
    text = (f'{config["dataset"]}, {config["max_iters"]} steps, seeds 0 to {config["seeds"] - 1}, {size}\n\n'
            f'{table(found)}\n')
    if len(rows) > 1 and config['seeds'] > 1:
        text += f'\n{differences(found)}\n'
    print(text)
    with checkpoint.whole(os.path.join(config['out'], 'table.md')) as file:
        file.write(text)
    draw(found, os.path.join(config['out'], 'table.png'))


if __name__ == '__main__':
    main()
