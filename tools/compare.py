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
from checkpoint import whole  # noqa: E402
from config import load_config, name_of  # noqa: E402

OPTIONS = dict(
    seeds=1,                   # trainings of each row: with the seeds 0, 1, ...
    jobs=1,                    # trainings at a time, which share the processor's cores
    out='',                    # a folder for the runs; '': runs/compare_<dataset>
)
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # 97.5 % of Student's t with 1, 2, ... degrees of freedom


def train_all(sample, rows, common, config):
    """Trains and tests every row with every seed -> {row: [its results.json of each seed, ...]}.

    rows: {row: arguments of train.py}; common: arguments of all.
    """
    folder = config['out']
    threads, features = str(max(1, (os.cpu_count() or 1) // config['jobs'])), os.path.join(folder, 'features')

    def train(job):
        row, seed = job
        out_dir = os.path.join(folder, re.sub(r'\W+', '_', ' '.join([row, *common])).strip('_') + f'_seed{seed}')
        results, ended = os.path.join(out_dir, 'results.json'), 0
        if not os.path.exists(results):
            os.makedirs(out_dir, exist_ok=True)
            resume = os.path.exists(os.path.join(out_dir, 'last.pt'))
            command = [sys.executable, os.path.join(ROOT, 'train.py'), sample, *rows[row], *common, f'--seed={seed}',
                       f'--features_dir={features}', f'--out_dir={out_dir}', f'--resume={resume}']
            with open(os.path.join(out_dir, 'output.txt'), 'a') as output:
                ended = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT,
                                       env={**os.environ, 'OMP_NUM_THREADS': threads}).returncode
        return row, out_dir, results, ended

    jobs, found = [(row, seed) for row in rows for seed in range(config['seeds'])], {row: [] for row in rows}
    with ThreadPool(config['jobs']) as pool:
        for row, out_dir, results, ended in tqdm(pool.imap(train, jobs), total=len(jobs), unit='training', disable=None):
            if ended:
                sys.exit(f'{row}: the training ended with exit status {ended}; {out_dir}/output.txt tells why.')
            with open(results) as file:
                found[row].append(json.load(file))
    return found


def measures(results):
    """The column heads of results: what a row of results.json holds, and the shot."""
    parts = [part for part in ('within', 'across') if part in results[0]] or ['accuracy']
    return [(part, shot) for shot in dict.fromkeys(row['shot'] for row in results) for part in parts]


def titles(heads):
    return ' | '.join(f'{shot}-shot' + f', {part}' * (part != 'accuracy') for part, shot in heads)


def table(found):
    """Markdown: each row's mean and standard deviation over the seeds; of what is not trained, the interval over episodes."""
    first = next(iter(found.values()))[0]
    heads = measures(first)
    lines = [f'| | trained numbers | text | transductive | {titles(heads)} |', '| --- ' * (4 + len(heads)) + '|']
    rows = {name: [[row for row in first if row['method'] == name]]
            for name in dict.fromkeys(row['method'] for row in first if not row['checkpoint'])}
    for label, runs in found.items():
        for name in dict.fromkeys(row['method'] for row in runs[0] if row['checkpoint']):
            mode = name.partition(' ')[2]
            rows[f'{label} {mode}'.strip()] = [[row for row in run if row['method'] == name] for run in runs]
    for label, runs in rows.items():
        about, cells = runs[0][0], []
        for part, shot in heads:
            own = [row for run in runs for row in run if row['shot'] == shot]
            values = [row[part] for row in own]
            spread = own[0]['ci95' if part == 'accuracy' else f'{part}_ci95']
            if len(values) > 1:
                spread = statistics.stdev(values)
            cells.append(f'{statistics.mean(values):.1f} ± {spread:.1f}')
        text, transductive = ('yes' if about[key] else '' for key in ('text', 'transductive'))
        lines.append(f'| {label} | {about["parameters"]:,} | {text} | {transductive} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def differences(found):
    """Markdown: each row less the first one, paired by seed, with the 95 % interval of the mean over seeds."""
    (base, base_runs), *others = found.items()
    heads = measures(base_runs[0])
    lines = [f'| less {base} | {titles(heads)} |', '| --- ' * (1 + len(heads)) + '|']

    def values(runs, part, shot):
        return [next(row[part] for row in run if row['checkpoint'] and row['shot'] == shot) for run in runs]

    for label, runs in others:
        cells = []
        for part, shot in heads:
            less = [a - b for a, b in zip(values(runs, part, shot), values(base_runs, part, shot))]
            half = STUDENT[min(len(less), 10) - 2] * statistics.stdev(less) / math.sqrt(len(less))
            cells.append(f'{statistics.mean(less):+.1f} ± {half:.1f}')
        lines.append(f'| {label} | {" | ".join(cells)} |')
    return '\n'.join(lines)


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
    found = train_all(sample, rows, common, config)
    text = (f'{config["dataset"]}, {config["max_iters"]} steps, seeds 0 to {config["seeds"] - 1}, '
            f'{config["test_episodes"]} episodes\n\n{table(found)}\n')
    if len(rows) > 1 and config['seeds'] > 1:
        text += f'\n{differences(found)}\n'
    print(text)
    with whole(os.path.join(config['out'], 'table.md')) as file:
        file.write(text)


if __name__ == '__main__':
    main()
