"""Kinetics-400, all classes. Recipes: EVL's, X-CLIP's and that of TWS with covariance supervision, as their sources have them.

    python train.py sample_configs/kinetics400.py --method=xclip

The lists: a line a video, its path and its class.
"""

config = dict(
    dataset='kinetics400',
    data_root='data/kinetics400',
    annotations=dict(train='data/kinetics400_lists/train.csv', val='data/kinetics400_lists/val.csv',
                     test='data/kinetics400_lists/test.csv'),
    clip='ViT-B/16',
    closed_set=True,
    method='evl',
    meta_batch=256,
    evl=dict(lr=4e-4, weight_decay=0.05, max_iters=50000, decay='cosine', grad_clip=0.0, flip=False, augment='randaug',
             views=3),
    # 30 epochs of 240,000 videos, 5 of them warm-up
    xclip=dict(lr=8e-5, finetune=8e-6, weight_decay=1e-3, max_iters=28125, warmup_iters=4688, decay='cosine', views=4, crops=3),
    tws=dict(lr=8e-4, finetune=8e-6, weight_decay=5e-4, max_iters=28125, warmup_iters=4688, decay='cosine', views=4, crops=3),
    eval_interval=1000,
    fetch='Needs the Kinetics-400 videos, https://github.com/cvdfoundation/kinetics-dataset, in data/kinetics400 and lists of '
          'them, "path class" or "path,class" a line, in data/kinetics400_lists.',
)
