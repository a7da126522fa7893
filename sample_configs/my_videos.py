"""Your own videos: a folder per class, each with a few videos or folders of numbered frames. Copy this file and change it.

The classes are dealt out to training, validation and test by the fractions and the seed; or name them, as the other files do.
"""

config = dict(
    dataset='my_videos',
    data_root='data/my_videos',
    splits=dict(train=0.6, val=0.2, test=0.2),
    shot=1,
    queries=2,
    flip=False,
    lower=True,
    max_iters=500,
    eval_interval=100,
    fetch='Expected: data/my_videos/<class>/<video>, a folder per class. Elsewhere: --data_root=...',
)
