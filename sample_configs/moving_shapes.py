"""The demo: short clips of a moving shape, whose classes differ only in time. Made on the spot; runs on a laptop's CPU."""

config = dict(
    dataset='moving_shapes',
    data_root='data/moving_shapes',
    prepare='demo/shapes.py',
    clip='demo/tiny_clip.pt',
    resize=64,
    augment='none',
    flip=False,
    shot=1,
    queries=3,
    meta_batch=1,
    max_iters=1000,
    lr=1e-3,
    warmup_iters=30,
    decay='cosine',
    eval_interval=250,
    log_interval=25,
)
