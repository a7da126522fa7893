"""The test: thousands of episodes from features encoded once.

    python eval.py sample_configs/diving48.py --ckpt=runs/diving48/best.pt     a checkpoint
    python eval.py --ckpt='runs/seed*/best.pt'                                 several: each, and all together
    python eval.py sample_configs/diving48.py                                  training-free rows alone

In reading order: building a model (configure, build, load_checkpoint), episodes (draw_episodes, load_episodes), the methods
that label them (mean_pool, zero_shot, vba) and the table (predict, evaluate, together). encoding.py encodes the videos.
"""

import glob
import hashlib
import itertools
import json
import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

import clip_loader
import data
import pictures
import ranks
from config import DEFAULTS, MODEL_OPTIONS, load_config, resolve_device
from decode import UnreadableVideo, Video
from encoding import PROBES, encode, encode_frozen, encode_split, subset
from model import VBA, class_scores, inductive_mask, log_scores, trainable_state
from reader import ClipMaker

QUERY_BYTES = dict(cpu=2 ** 23, cuda=2 ** 28)  # of Q for the episodes that go at a time: on a CPU few enough for its caches


def configure(argv):
    """The command line -> (config, its checkpoints). A checkpoint brings the options that make the model with it.

    Without a sample config all its options hold but for those on the command line; with one, as in a test across datasets,
    only those of MODEL_OPTIONS. Stops where the command line asks for another model than the checkpoint's, or where several
    checkpoints are of different models.
    """
    config = load_config(argv)
    if not config['ckpt']:
        return config, []
    patterns = config['ckpt'] if isinstance(config['ckpt'], list) else [config['ckpt']]
    paths = sum((sorted(glob.glob(path)) or [path] for path in patterns), [])
    checkpoints = [load_checkpoint(path) for path in paths]
    saved = checkpoints[0]['config']
    given = {arg[2:].partition('=')[0] for arg in argv if arg.startswith('--')}
    if all(arg.startswith('--') for arg in argv):
        config = load_config(argv, {**DEFAULTS, **saved})
    for path, other in [('the command line', config | {key: saved[key] for key in MODEL_OPTIONS if key not in given}),
                        *((path, checkpoint['config']) for path, checkpoint in zip(paths[1:], checkpoints[1:]))]:
        changed = [key for key in MODEL_OPTIONS if other[key] != saved[key]]
        if changed:
            sys.exit(f'{paths[0]} is another model than {path} has it: ' + ', '.join(
                f'{key}={saved[key]!r}, not {other[key]!r}' for key in changed))
    config.update({key: saved[key] for key in MODEL_OPTIONS}, ckpt=paths)
    config['trained_on'] = [checkpoint['config']['dataset'] for checkpoint in checkpoints]
    if 'out_dir' not in given:  # results lie beside the checkpoint, not among those of another run on this dataset
        config['out_dir'] = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    if 'clip' not in given:  # it may lie elsewhere on this machine: its hash is checked
        config['clip'] = saved['clip']
    return config, checkpoints


def load_clip(config):
    """The CLIP that a config names. Stops with one sentence where its weights are not to be had or not right."""
    try:
        return clip_loader.load_clip(config['clip'], config['act'], config['image_size'])
    except (OSError, ValueError) as error:
        sys.exit(str(error))


def build(config, clip):
    """A VBA over the CLIP's image tower, new parts initialised from config['seed']. Stops where the tower is not that deep."""
    depth = len(clip.visual.transformer.resblocks)
    if config['levels'] > depth:
        sys.exit(f'levels={config["levels"]}, but the image tower of clip={config["clip"]!r} has {depth} blocks.')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config['seed'])
        return VBA(clip.visual, config)


def load_checkpoint(path, device='cpu'):
    """The dict that train.py saved. Stops with one sentence when there is none or it is not a checkpoint."""
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        checkpoint['model'], checkpoint['config'], checkpoint['weights_hash']
    except FileNotFoundError:
        sys.exit(f'There is no checkpoint {path}; train.py writes best.pt and last.pt into its out_dir.')
    except Exception as error:
        sys.exit(f'{path} is not a checkpoint of train.py: {type(error).__name__}: {error}')
    return checkpoint


def restore(model, clip, checkpoint, path):
    """Fills the model's trainable parameters. Stops when the checkpoint belongs to other weights or another model."""
    if checkpoint['weights_hash'] != clip.weights_hash:
        sys.exit(f'{path} was trained beside other CLIP weights (clip={checkpoint["config"]["clip"]!r}, hash '
                 f'{checkpoint["weights_hash"][:12]}) than those loaded (hash {clip.weights_hash[:12]}).')
    missing, unexpected = model.load_state_dict(checkpoint['model'], strict=False)
    missing = set(missing) & set(trainable_state(model))
    if missing or unexpected:
        sys.exit(f'{path} holds another model: missing {sorted(missing)[:3]}, unexpected {sorted(unexpected)[:3]}.')


def names_of(videos):
    """Of each video of a split: its class, file, and where it is a part of a file, its first frame."""
    return [f'{videos.classes[c]}/{os.path.basename(v.path)}' + (f'@{v.start}' if v.start else '')
            for v, c in zip(videos.videos, videos.labels)]


def draw_episodes(videos, way, shot, queries, seed, count):
    """The `count` test episodes of a seed, (count, way * (shot + queries)) indices into videos.videos."""
    return np.stack([data.episode(videos, way, shot, queries, seed, i) for i in range(count)])


def hash_of(videos, episodes):
    """Two people with the same hash tested on the same videos in the same episodes."""
    return hashlib.sha256('\n'.join(names_of(videos)).encode() + episodes.astype('<i8').tobytes()).hexdigest()[:16]


def load_episodes(path, videos):
    """The lists that save_episodes wrote, {(way, shot, queries): indices into videos.videos}."""
    try:
        with open(path, encoding='utf-8') as file:
            saved = json.load(file)
        place = {name: i for i, name in enumerate(names_of(videos))}
        if len(place) < len(videos.videos):
            sys.exit(f'{path} cannot be used: videos of one class in different folders have the same name.')
        missing = [name for name in saved['videos'] if name not in place]
        if missing:
            sys.exit(f'The episodes of {path} need {len(missing)} videos that cannot be read here, such as {missing[0]!r}.')
        order = np.array([place[name] for name in saved['videos']])
        return {(each['way'], each['shot'], each['queries']): order[np.array(each['episodes'])] for each in saved['lists']}
    except (OSError, ValueError, LookupError, TypeError) as error:
        sys.exit(f'{path} is no file of --episodes_file: {type(error).__name__}: {error}')


def save_episodes(path, videos, lists):
    """JSON, dict(videos=[name, ...], lists=[dict(way=, shot=, queries=, episodes=[[index of a name, ...], ...]), ...])."""
    save_json(path, dict(videos=names_of(videos), lists=[
        dict(way=way, shot=shot, queries=queries, episodes=episodes.tolist())
        for (way, shot, queries), episodes in lists.items()]))


def mean_pool(pooled, way, shot):
    """Row 0, training-free: cosine of a query's mean-pooled CLIP feature to the mean of each class's supports."""
    def scores(part):
        support, query = pooled[part[:, :way * shot]], pooled[part[:, way * shot:]]
        prototypes = F.normalize(support.unflatten(1, (way, shot)).mean(2), dim=-1)  # (n, N, embed_dim)
        return query @ prototypes.transpose(1, 2)
    return scores


def zero_shot(pooled, text, labels, way, shot):
    """Cosine of a query's mean-pooled CLIP feature to the texts (classes, embed_dim) of its episode's class names."""
    def scores(part):
        classes = labels[part[:, :way * shot:shot]]  # (n, N)
        return pooled[part[:, way * shot:]] @ text[classes].transpose(1, 2)
    return scores


def vba(model, start, tokens, way, shot, mode, temp, autocast):
    """The aggregator on what `encode` kept. mode as in VBA.aggregate."""
    labels = torch.arange(way, device=start.device).repeat_interleave(shot)

    def scores(part):
        with autocast:
            q = model.aggregate(start[part], tokens, way * shot, mode, part) if mode else start[part]
        return class_scores(log_scores(q, way * shot, temp), labels, way)
    return scores


@torch.no_grad()
def predict(scores, episodes, n_support, dim, device, note):
    """Labels every query of every episode: `scores` takes indices (n, B) and gives (n, M, N). Returns (count, M) in 0..N-1.

    The episodes go some at a time, of dim (D) numbers a video; of several ranks each takes its share.
    """
    (count, videos), (rank, world) = episodes.shape, ranks.rank_of()
    batch = int(np.clip(QUERY_BYTES[torch.device(device).type] // (4 * dim * videos), 1, -(-count // world)))
    found = torch.zeros(count, videos - n_support, dtype=torch.int64, device=device)
    firsts = range(0, count, batch)[rank::world]
    for first in ranks.progress(firsts, note, len(firsts), unit_scale=batch, unit='episode'):
        found[first:first + batch] = scores(torch.from_numpy(episodes[first:first + batch]).to(device)).argmax(-1)
    return ranks.add_up(found).cpu().numpy()


def correct(predictions, way):
    """Predictions (count, M) with the queries class-major -> which are right, (count, M) of bool."""
    return predictions == np.repeat(np.arange(way), predictions.shape[1] // way)


def interval(values):
    """Mean and half-width of its 95 % interval, 1.96 * std / sqrt(n), of values (n,), in percent."""
    return 100 * values.mean(), 100 * 1.96 * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float('nan')


def validate(config, model, way, frozen, episodes, device, autocast):
    """Accuracy (a fraction) of the model in its own mode on a fixed list of 1-shot episodes of what encode_frozen gave."""
    start, tokens = encode(model, frozen, autocast)
    scores = vba(model, start, tokens, way, 1, model.mode, config['temp'], autocast)
    return correct(predict(scores, episodes, way, start.shape[1], device, 'validation'), way).mean()


def evaluate(config, clip, models, encoded, device, autocast, lists=None):
    """The table: every method on the same episodes of encode_split's videos, for each of test_ways and test_shots.

    lists: {(way, shot, queries): episodes} to use; else they are drawn by the seed. Returns the rows, a list of dicts as
    results.json holds them; for each row which queries were right, (episodes, M); and the lists.
    """
    videos, pooled, used = encoded['videos'], encoded['pooled'], {}
    labels, rows, rights = torch.from_numpy(videos.labels).to(device), [], []
    trained_on = dict(zip(config['ckpt'] or [], config.get('trained_on') or [config['dataset']]))
    copies = 1 + len(PROBES) * (bool(models) and config['probe'])  # rows of a video in what is kept
    for way, shot in itertools.product(config['test_ways'] or [config['way']], config['test_shots']):
        way, shot, queries = sizes = data.fit_episode(config, videos, way, shot, config['test_queries'])
        if sizes in used:  # lowered to the same
            continue
        if lists and sizes not in lists:
            sys.exit(f'{config["episodes_file"]} has no {way}-way {shot}-shot episodes with {queries} queries a class, only '
                     + ', '.join(map(str, lists)) + ' (way, shot, queries).')
        episodes = used[sizes] = lists[sizes] if lists else draw_episodes(
            videos, *sizes, config['seed'], config['test_episodes'])
        episodes_hash, is_query = hash_of(videos, episodes), np.arange(episodes.shape[1]) >= way * shot
        methods = [('clip-mean-pool', None, mean_pool(pooled, way, shot), episodes)]
        if 'text' in encoded:
            methods.append(('clip-zero-shot', None, zero_shot(pooled, encoded['text'], labels, way, shot), episodes))
        for path, model, (start, tokens) in zip(config['ckpt'] or [None], models, encoded['kept']):
            for mode in ('joint', 'inductive') if model.mode else ('inductive',):
                scores = vba(model, start, tokens, way, shot, model.mode and mode, config['temp'], autocast)
                probes = PROBES if copies > 1 and mode == (model.mode or mode) else ()
                methods += [(f'vba-{mode}' + (f', queries {PROBES[i - 1]}' if i else ''), path, scores,
                             episodes * copies + i * is_query) for i in range(1 + len(probes))]
        for method, path, scores, indices in methods:
            began = time.time()
            dim = clip.visual.proj.shape[method.startswith('clip')]  # D, or embed_dim
            predictions = predict(scores, indices, way * shot, dim, device, f'{method} {shot}-shot')
            right = correct(predictions, way)
            accuracy, ci95 = interval(right.mean(1))
            true = videos.labels[episodes[:, way * shot:]]
            guessed = videos.labels[np.take_along_axis(episodes[:, :way * shot:shot], predictions, 1)]
            confusion = np.zeros((len(videos.classes),) * 2, int)
            np.add.at(confusion, (true, guessed), 1)
            trained = method.startswith('vba')
            rows.append(dict(
                method=method, checkpoint=path, dataset=config['dataset'], split=videos.name, way=way, shot=shot,
                queries=queries, episodes=len(episodes), episodes_hash=episodes_hash, accuracy=accuracy, ci95=ci95,
                transductive='joint' in method, text=method == 'clip-zero-shot', frames=config['frames'],
                sampling=config['test_sampling'], backbone=os.path.basename(config['clip']), weights_hash=clip.weights_hash,
                seed=config['seed'], seconds=time.time() - began, videos=len(videos.videos), missing=encoded['missing'],
                trained_on=trained_on[path] if trained else None,
                selection='val' if trained else None, classes=videos.classes, confusion=confusion.tolist(),
                per_class=[100 * right[true == c].mean() if (true == c).any() else None for c in range(len(videos.classes))]))
            rights.append(right)
            print(line(rows[-1]), flush=True)
    return rows, rights, used


def together(rows, rights):
    """Rows of several checkpoints -> one more row for each method and size: the mean accuracy, its interval over episodes for
    these very checkpoints, and `spread`, the standard deviation from one checkpoint to the next."""
    groups, found = {}, []
    for row, right in zip(rows, rights):
        if row['checkpoint']:
            groups.setdefault((row['method'], row['episodes_hash']), []).append((row, right))
    for group in groups.values():
        accuracy, ci95 = interval(np.mean([right.mean(1) for _, right in group], 0))
        spread = float(np.std([row['accuracy'] for row, _ in group], ddof=1))
        found.append({**group[0][0], 'checkpoint': [row['checkpoint'] for row, _ in group], 'accuracy': accuracy,
                      'ci95': ci95, 'spread': spread, 'seconds': sum(row['seconds'] for row, _ in group),
                      'confusion': np.sum([row['confusion'] for row, _ in group], 0).tolist(), 'per_class': None})
        print(line(found[-1]), flush=True)
    return found


def print_pairs(rows, rights):
    """Differences between methods on the same episodes: their interval is far tighter than two intervals compared. A probe is
    compared with its own method alone."""
    several = len({row['checkpoint'] for row in rows} - {None}) > 1
    for (row, right), (other, base) in itertools.combinations(zip(rows, rights), 2):
        if any('queries' in each['method'] for each in (row, other)) and not other['method'].startswith(row['method'] + ','):
            continue
        if row['episodes_hash'] == other['episodes_hash'] and row['checkpoint'] in (None, other['checkpoint']):
            mean, half = interval(base.mean(1) - right.mean(1))
            print(f'{row["way"]}-way {row["shot"]}-shot  {other["method"]} - {row["method"]}: {mean:+.2f} ± {half:.2f} points '
                  f'(paired)' + several * f'  {other["checkpoint"]}')


def print_mistakes(row, most=5):
    """The classes most often taken for another."""
    confusion = np.array(row['confusion'], float)
    share = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    np.fill_diagonal(share, 0)
    print(f'{row["method"]} {row["shot"]}-shot, most often mistaken:')
    for true, guessed in list(zip(*np.unravel_index(np.argsort(-share, axis=None), share.shape)))[:most]:
        print(f'  {row["classes"][true]} for {row["classes"][guessed]}: {share[true, guessed]:.1f} % of its queries')


@torch.no_grad()
def draw_attention(config, model, videos, reader, image_size, device, autocast, path):
    """The picture of the clip config['attention']: where each level's query looks in its frames, averaged over heads, and the
    scores of all classes of the split, from as many examples each as the largest of test_shots, in inductive mode."""
    supports, frozen = encode_frozen(model, subset(videos, np.concatenate([
        members[:max(config['test_shots'])] for members in videos.members])), reader, device, autocast)
    n_support = len(supports.videos)
    try:
        frames = ClipMaker(config | dict(cache_gb=0.0, cache_dir=None), image_size).clip(Video(config['attention']), None)
    except UnreadableVideo as error:
        sys.exit(f'--attention: {error}')
    weights = []
    with autocast:
        own, _ = model.frozen(frames[None].to(device))
        tokens = model.tokens(model.kept([torch.cat([x.to(y), y]) for x, y in zip(frozen, own)]))
        q = model.query.expand(1, n_support + 1, -1)  # one episode: the supports, then the clip
        mask = inductive_mask(q.shape[1], n_support, device)
        for level, x in zip(model.levels, tokens):
            weight = level.frame_attn.folded_weights(level.ln_frame(q[0, -1]), x[-1], level.ln_tokens).mean(0)  # (T*L,)
            patches = weight.float().unflatten(0, (len(frames), -1))[:, -model.visual.grid ** 2:]  # without a class token
            weights.append(patches.unflatten(1, (model.visual.grid,) * 2).cpu().numpy())
            q = level.cross_frame(q, x[None])
            q = level.cross_video(q, mask) if model.mode else q
    labels = torch.from_numpy(supports.labels).to(device)
    scores = class_scores(log_scores(q, n_support, config['temp']), labels, len(videos.classes))
    scores = scores[0, 0] / scores[0, 0].sum()
    if ranks.rank_of()[0] == 0:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        pictures.attention(frames, weights, dict(zip(videos.classes, scores.tolist())), path)
        print(f'wrote {path}')


def line(row):
    """One row of the table, for people."""
    runs = f' ({len(row["checkpoint"])} checkpoints, spread {row["spread"]:.2f})' if 'spread' in row else ''
    return (f'{row["dataset"]} {row["split"]}  {row["way"]}-way {row["shot"]}-shot  {row["method"]:15} '
            f'{row["accuracy"]:6.2f} ± {row["ci95"]:.2f} %{runs}   {row["episodes"]} episodes ({row["episodes_hash"]}), '
            f'{row["queries"]} query a class, {"transductive" if row["transductive"] else "inductive"}, {row["seconds"]:.1f} s')


def save_json(path, content):
    """Writes a JSON file, whole or not at all."""
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    with open(path + '.tmp', 'w', encoding='utf-8') as file:
        json.dump(content, file, indent=1)
    os.replace(path + '.tmp', path)


def main():
    config, checkpoints = configure(sys.argv[1:])
    device, dtype = resolve_device(config)
    device = ranks.begin(device)
    autocast = torch.autocast(torch.device(device).type, dtype, enabled=dtype is not torch.float32)
    if config['attention'] and not checkpoints:
        sys.exit('--attention draws a trained model: --ckpt= names one.')
    with ranks.rank_0_first():  # it makes or fetches what is missing
        split, clip, models = data.load_splits(config)[config['test_split']], load_clip(config), []
    listed = config['episodes_file']
    given = listed and os.path.exists(listed)
    if not given:
        data.check_test(config, split)
    for checkpoint, path in zip(checkpoints, config['ckpt'] or []):
        models.append(build(config, clip))
        restore(models[-1], clip, checkpoint, path)
        models[-1].to(device)
    reader = data.ClipReader(config, clip.visual.image_size)
    try:
        model = models[0] if models else build({**config, 'temporal_adapter': False}, clip).to(device)
        encoded = encode_split(config, clip, model, models, split, reader, device, autocast)
        if config['attention']:
            draw_attention(config, models[0], encoded['videos'], reader, clip.visual.image_size, device, autocast,
                           os.path.join(config['out_dir'], 'attention.png'))
    finally:
        reader.close()
    lists = load_episodes(listed, encoded['videos']) if given else None
    rows, rights, used = evaluate(config, clip, models, encoded, device, autocast, lists)
    if ranks.rank_of()[0] == 0:
        print_pairs(rows, rights)
        rows += together(rows, rights) if len(models) > 1 else []
        print_mistakes(rows[-1])
        os.makedirs(config['out_dir'], exist_ok=True)
        pictures.confusion(rows[-1], os.path.join(config['out_dir'], 'confusion.png'))
        across = any(name != config['dataset'] for name in config.get('trained_on', []))
        save_json(os.path.join(config['out_dir'], f'results_{config["dataset"]}.json' if across else 'results.json'), rows)
        if listed and not given:
            save_episodes(listed, encoded['videos'], used)
            print(f'wrote the episodes into {listed}')
    ranks.end()


if __name__ == '__main__':
    main()
