"""The test: thousands of episodes from features encoded once.

    python eval.py sample_configs/diving48.py --ckpt=runs/diving48/best.pt     a checkpoint
    python eval.py sample_configs/diving48.py                                  training-free rows alone

In reading order: building a model (build, load_checkpoint), encoding a split (encode_frozen, encode), episodes
(episode_list), the methods that label them (mean_pool, zero_shot, vba) and the table (evaluate, print_rows, save_rows).
"""

import dataclasses
import hashlib
import itertools
import json
import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import clip_loader
import data
import pictures
from config import DEFAULTS, load_config, resolve_device
from decode import UnreadableVideo, Video
from model import VBA, class_scores, inductive_mask, log_scores, trainable_state
from reader import ClipMaker

GATHER_BYTES = dict(cpu=2 ** 26, cuda=2 ** 31)  # tokens gathered for one batch of episodes
MODEL_OPTIONS = ('act', 'image_size', 'levels', 'temporal_adapter', 'cls_token', 'cross_video', 'alpha_init', 'attn_proj',
                 'mlp_order', 'frames', 'norm', 'temp', 'resize')
ENCODE_VIDEOS = 16  # videos encoded at a time


def configure(argv):
    """The command line -> (config, checkpoint or None). A checkpoint brings the options that make the model with it.

    Without a sample config all its options hold but for those on the command line; with one, as in a test across datasets,
    only those of MODEL_OPTIONS. Stops where the command line asks for another model than the checkpoint's.
    """
    config = load_config(argv)
    if not config['ckpt']:
        return config, None
    checkpoint = load_checkpoint(config['ckpt'])
    saved = checkpoint['config']
    given = {arg[2:].partition('=')[0] for arg in argv if arg.startswith('--')}
    if all(arg.startswith('--') for arg in argv):
        config = load_config(argv, {**DEFAULTS, **saved})
    changed = [key for key in MODEL_OPTIONS if key in given and config[key] != saved[key]]
    if changed:
        sys.exit(f'{config["ckpt"]} is another model: ' + ', '.join(
            f'{key}={saved[key]!r}, not {config[key]!r}' for key in changed))
    config.update({key: saved[key] for key in MODEL_OPTIONS}, trained_on=saved['dataset'])
    if 'out_dir' not in given:  # results lie beside the checkpoint, not among those of another run on this dataset
        config['out_dir'] = os.path.dirname(os.path.abspath(config['ckpt']))
    if 'clip' not in given:  # it may lie elsewhere on this machine: its hash is checked
        config['clip'] = saved['clip']
    return config, checkpoint


def load_clip(config):
    """The CLIP that a config names. Stops with one sentence where its weights are not to be had or not right."""
    try:
        return clip_loader.load_clip(config['clip'], config['act'], config['image_size'])
    except (OSError, ValueError) as error:
        sys.exit(str(error))


def build(config, clip):
    """A VBA over the CLIP's image tower, new parts initialised from config['seed']."""
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


@torch.no_grad()
def encode_frozen(model, split, reader, device, autocast, draw=None):
    """Runs the frozen part of the model over a split's videos, each once.

    Returns a dict: `videos`, the split without the videos that could not be read; `frozen`, what VBA.frozen gives, of all
    videos (V, T, *, D), float16 on CUDA and in training, else float32; `pooled` (V, embed_dim), unit-length mean over
    frames of plain CLIP's features. draw: None for test frames; a number for that random draw of frames, crop and flip.
    """
    jobs = np.split(np.arange(len(split.videos)), np.arange(ENCODE_VIDEOS, len(split.videos), ENCODE_VIDEOS))
    frozen, pooled, read = [], [], []
    clips = reader.stream(split, jobs, train=draw is not None, first=(draw or 0) * len(jobs))
    for frames, indices in tqdm(clips, f'encoding {split.name} videos', len(jobs), unit_scale=ENCODE_VIDEOS, unit='video',
                                leave=False, disable=None):
        if not len(indices):  # none of these could be read
            continue
        with autocast:
            parts, features = model.frozen(frames.to(device, non_blocking=True), head=True)
        frozen.append([x.half() if x.is_cuda or draw is not None else x for x in parts])
        pooled.append(F.normalize(F.normalize(features.float(), dim=-1).mean(1), dim=-1))
        read.append(indices)
    if not read:
        sys.exit(f'None of the {len(split.videos)} {split.name} videos could be read.')
    read = np.concatenate(read)
    videos = dataclasses.replace(split, videos=[split.videos[i] for i in read], labels=split.labels[read])
    return dict(videos=videos, frozen=[torch.cat(parts) for parts in zip(*frozen)], pooled=torch.cat(pooled))


@torch.no_grad()
def encode(model, frozen, autocast):
    """`frozen` of encode_frozen -> what the aggregator needs of each video, whatever its episode.

    Returns `start` (V, D), Q*_0; and `tokens`, S-1 tensors (V, T*L, D) for the other levels. Where no level looks at other
    videos the whole answer is the video's own: `start` is then Q_S and `tokens` is empty.
    """
    starts, tokens = [], []
    for parts in zip(*(x.split(ENCODE_VIDEOS) for x in frozen)):
        with autocast:
            kept = model.tokens(model.kept(parts))
            q = model.start(kept[0])
            if not model.mode:
                q, kept = model.aggregate(q[None], [k[None] for k in kept[1:]], len(q), False)[0], kept[:1]
        starts.append(q.float())
        tokens.append([k.to(parts[0].dtype) for k in kept[1:]])
    return torch.cat(starts), [torch.cat(level) for level in zip(*tokens)]


def episode_list(split, way, shot, queries, seed, count):
    """The `count` test episodes of a seed, (count, way * (shot + queries)) indices into split.videos, and their hash.

    Two people with the same hash tested on the same videos in the same episodes.
    """
    episodes = np.stack([data.episode(split, way, shot, queries, seed, i) for i in range(count)])
    names = [f'{split.classes[c]}/{os.path.basename(v.path)}' for v, c in zip(split.videos, split.labels)]
    digest = hashlib.sha256('\n'.join(names).encode() + episodes.astype('<i8').tobytes())
    return episodes, digest.hexdigest()[:16]


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
            q = model.aggregate(start[part], [level[part] for level in tokens], way * shot, mode) if mode else start[part]
        return class_scores(log_scores(q, way * shot, temp), labels)
    return scores


@torch.no_grad()
def predict(scores, episodes, bytes_per_video, device, note=None):
    """Labels every query of every episode: `scores` takes indices (n, B) and gives (n, M, N). Returns (count, M) in 0..N-1.

    As many episodes go at a time as gather about GATHER_BYTES of tokens.
    """
    batch = max(1, min(1000, GATHER_BYTES[torch.device(device).type] // max(1, bytes_per_video * episodes.shape[1])))
    parts = torch.from_numpy(episodes).to(device).split(batch)
    parts = tqdm(parts, note, unit_scale=batch, unit='episode', leave=False, disable=None) if note else parts
    return torch.cat([scores(part).argmax(-1) for part in parts]).cpu().numpy()


def token_bytes(tokens):
    """Bytes that one video's tokens take."""
    return sum(level[0].numel() * level.element_size() for level in tokens)


def correct(predictions, way):
    """Predictions (count, M) with the queries class-major -> which are right, (count, M) of bool."""
    return predictions == np.repeat(np.arange(way), predictions.shape[1] // way)


def interval(values):
    """Mean and half-width of its 95 % interval, 1.96 * std / sqrt(n), of values (n,), in percent."""
    return 100 * values.mean(), 100 * 1.96 * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float('nan')


def validate(config, model, encoded, episodes, device, autocast):
    """Accuracy (a fraction) of the model in its own mode on a fixed list of 1-shot episodes of encode_frozen's videos."""
    way = min(config['way'], len(encoded['videos'].classes))
    start, tokens = encode(model, encoded['frozen'], autocast)
    scores = vba(model, start, tokens, way, 1, model.mode, config['temp'], autocast)
    return correct(predict(scores, episodes, token_bytes(tokens), device), way).mean()


def encode_split(config, clip, model, split, reader, device, autocast):
    """`encode_frozen` of a split, with the time it took printed, and the texts of its class names where CLIP can read them."""
    began = time.time()
    encoded = encode_frozen(model, split, reader, device, autocast)
    print(f'encoded {len(encoded["videos"].videos)} {split.name} videos in {time.time() - began:.0f} s', flush=True)
    encoded['missing'] = len(split.videos) - len(encoded['videos'].videos)
    if clip.vocab_size:
        try:
            encoded['text'] = clip_loader.zero_shot_weights(
                clip, clip_loader.tokenizer_of(clip), split.classes, config['templates']).to(device)
        except (OSError, ValueError) as error:
            print(f'no clip-zero-shot row: {error}')
    return encoded


def evaluate(config, clip, model, encoded, device, autocast, trained=True):
    """The table: every method on the same episodes of encode_split's videos, for each of test_shots.

    Returns the rows, a list of dicts as results.json holds them, and for each row which queries were right, (episodes, M).
    """
    videos, pooled = encoded['videos'], encoded['pooled']
    labels, count = torch.from_numpy(videos.labels).to(device), len(videos.videos)
    if trained:
        start, tokens = encode(model, encoded['frozen'], autocast)
    probes = {}
    if trained and config['probe']:  # the same queries with their frames in another order: indices from V, 2V, 3V on
        orders = dict(reversed=range(config['frames'])[::-1], still=[config['frames'] // 2] * config['frames'],
                      shuffled=np.random.default_rng(config['seed']).permutation(config['frames']))
        for number, (name, order) in enumerate(orders.items(), 1):
            probes[name] = number * count
            changed = encode(model, [x[:, torch.tensor(list(order), device=x.device)] for x in encoded['frozen']], autocast)
            start, tokens = torch.cat([start, changed[0]]), [torch.cat(pair) for pair in zip(tokens, changed[1])]
    rows, rights = [], []
    for shot in config['test_shots']:
        way, shot, queries = data.fit_episode(config, videos, config['way'], shot, config['test_queries'])
        episodes, episodes_hash = episode_list(videos, way, shot, queries, config['seed'], config['test_episodes'])
        modes = ('joint', 'inductive') if trained and model.mode else ('inductive',) if trained else ()
        methods = [('clip-mean-pool', mean_pool(pooled, way, shot), pooled[0].numel() * 4, 0)]
        if 'text' in encoded:
            methods.append(('clip-zero-shot', zero_shot(pooled, encoded['text'], labels, way, shot), pooled[0].numel() * 4, 0))
        for mode in modes:
            scores = vba(model, start, tokens, way, shot, model.mode and mode, config['temp'], autocast)
            methods.append((f'vba-{mode}', scores, token_bytes(tokens), 0))
            if mode == (model.mode or mode):
                methods += [(f'vba-{mode}, queries {name}', scores, token_bytes(tokens), offset)
                            for name, offset in probes.items()]
        for method, scores, size, offset in methods:
            began = time.time()
            shifted = episodes + offset * (np.arange(episodes.shape[1]) >= way * shot)
            predictions = predict(scores, shifted, size, device, f'{method} {shot}-shot')
            right = correct(predictions, way)
            accuracy, ci95 = interval(right.mean(1))
            true = videos.labels[episodes[:, way * shot:]]
            guessed = videos.labels[np.take_along_axis(episodes[:, :way * shot:shot], predictions, 1)]
            confusion = np.zeros((len(videos.classes),) * 2, int)
            np.add.at(confusion, (true, guessed), 1)
            rows.append(dict(
                method=method, dataset=config['dataset'], split=videos.name, way=way, shot=shot, queries=queries,
                episodes=len(episodes), episodes_hash=episodes_hash, accuracy=accuracy, ci95=ci95,
                transductive='joint' in method, text=method == 'clip-zero-shot', frames=config['frames'],
                sampling=config['test_sampling'], backbone=os.path.basename(config['clip']), weights_hash=clip.weights_hash,
                seed=config['seed'], seconds=time.time() - began, videos=count, missing=encoded['missing'],
                trained_on=config.get('trained_on', config['dataset']) if method.startswith('vba') else None,
                selection='val' if method.startswith('vba') else None, classes=videos.classes, confusion=confusion.tolist(),
                per_class=[100 * right[true == c].mean() if (true == c).any() else None for c in range(len(videos.classes))]))
            rights.append(right)
            print(line(rows[-1]), flush=True)
    return rows, rights


def print_pairs(rows, rights):
    """Differences between methods on the same episodes: their interval is far tighter than two intervals compared."""
    for (row, right), (other, base) in itertools.combinations(zip(rows, rights), 2):
        if row['episodes_hash'] == other['episodes_hash']:
            mean, half = interval(base.mean(1) - right.mean(1))
            print(f'{row["shot"]}-shot  {other["method"]} - {row["method"]}: {mean:+.2f} ± {half:.2f} points (paired)')


def print_mistakes(row, most=5):
    """The classes most often taken for another."""
    confusion = np.array(row['confusion'], float)
    share = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    np.fill_diagonal(share, 0)
    print(f'{row["method"]} {row["shot"]}-shot, most often mistaken:')
    for true, guessed in list(zip(*np.unravel_index(np.argsort(-share, axis=None), share.shape)))[:most]:
        print(f'  {row["classes"][true]} for {row["classes"][guessed]}: {share[true, guessed]:.1f} % of its queries')


@torch.no_grad()
def draw_attention(config, model, encoded, image_size, device, autocast, path):
    """The picture of the clip config['attention']: where each level's query looks in its frames, averaged over heads, and the
    scores of all classes of the split, from as many examples each as the largest of test_shots, in inductive mode."""
    videos = encoded['videos']
    supports = np.concatenate([members[:max(config['test_shots'])] for members in videos.members])
    try:
        frames = ClipMaker(config | dict(cache_gb=0.0, cache_dir=None), image_size).clip(Video(config['attention']), None)
    except UnreadableVideo as error:
        sys.exit(f'--attention: {error}')
    weights = []
    with autocast:
        own, _ = model.frozen(frames[None].to(device))
        tokens = model.tokens(model.kept([torch.cat([x[supports], y.to(x.dtype)]) for x, y in zip(encoded['frozen'], own)]))
        q = model.query.expand(1, len(supports) + 1, -1)  # one episode: the supports, then the clip
        mask = inductive_mask(q.shape[1], len(supports), device)
        for level, x in zip(model.levels, tokens):
            weight = level.frame_attn.folded_weights(level.ln_frame(q[0, -1]), x[-1], level.ln_tokens).mean(0)  # (T*L,)
            patches = weight.float().unflatten(0, (len(frames), -1))[:, -model.visual.grid ** 2:]  # without a class token
            weights.append(patches.unflatten(1, (model.visual.grid,) * 2).cpu().numpy())
            q = level.cross_frame(q, x[None])
            q = level.cross_video(q, mask) if model.mode else q
    scores = class_scores(log_scores(q, len(supports), config['temp']), torch.from_numpy(videos.labels[supports]).to(device))
    scores = scores[0, 0] / scores[0, 0].sum()
    pictures.attention(frames, weights, dict(zip(videos.classes, scores.tolist())), path)
    print(f'wrote {path}')


def line(row):
    """One row of the table, for people."""
    return (f'{row["dataset"]} {row["split"]}  {row["way"]}-way {row["shot"]}-shot  {row["method"]:15} '
            f'{row["accuracy"]:6.2f} ± {row["ci95"]:.2f} %   {row["episodes"]} episodes ({row["episodes_hash"]}), '
            f'{row["queries"]} query a class, {"transductive" if row["transductive"] else "inductive"}, {row["seconds"]:.1f} s')


def save_rows(rows, path):
    """Writes results.json, whole or not at all."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + '.tmp', 'w') as file:
        json.dump(rows, file, indent=1)
    os.replace(path + '.tmp', path)


def main():
    config, checkpoint = configure(sys.argv[1:])
    device, dtype = resolve_device(config)
    autocast = torch.autocast(torch.device(device).type, dtype, enabled=dtype is not torch.float32)
    split = data.load_splits(config)[config['test_split']]
    clip = load_clip(config)
    model = build(config, clip)
    if checkpoint:
        restore(model, clip, checkpoint, config['ckpt'])
    model.to(device)
    reader = data.ClipReader(config, clip.visual.image_size)
    try:
        encoded = encode_split(config, clip, model, split, reader, device, autocast)
    finally:
        reader.close()
    rows, rights = evaluate(config, clip, model, encoded, device, autocast, trained=bool(checkpoint))
    print_pairs(rows, rights)
    print_mistakes(rows[-1])
    os.makedirs(config['out_dir'], exist_ok=True)
    pictures.confusion(rows[-1], os.path.join(config['out_dir'], 'confusion.png'))
    if config['attention']:
        draw_attention(config, model, encoded, clip.visual.image_size, device, autocast,
                       os.path.join(config['out_dir'], 'attention.png'))
    across = config.get('trained_on', config['dataset']) != config['dataset']
    save_rows(rows, os.path.join(config['out_dir'], f'results_{config["dataset"]}.json' if across else 'results.json'))


if __name__ == '__main__':
    main()
