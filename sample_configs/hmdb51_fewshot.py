"""HMDB51, K videos of each of all 51 classes, tested on all of split 1's test list. Recipe: X-CLIP's for few examples.

    python train.py sample_configs/hmdb51_fewshot.py --per_class=2      # 4, 8, 16

As published: ViT-B/16, 32 frames, a batch of 64, 50 epochs; that is 80 to 640 steps for K = 2 to 16. A tenth of the training
list is held out for the choice of the checkpoint, which X-CLIP makes on the test list.
"""

config = dict(
    dataset='hmdb51_fewshot',
    data_root='data/hmdb51',
    annotations='data/testTrainMulti_7030_splits/*_test_split1.txt',
    clip='ViT-B/16',
    closed_set=True,
    holdout=dict(val=0.1, test=0.0),
    per_class=2,
    method='xclip',
    xclip=dict(finetune=2e-6),
    frames=32,
    meta_batch=64,
    max_iters=80,
    lr=2e-5,
    weight_decay=1e-3,
    warmup_iters=8,
    decay='cosine',
    eval_interval=20,
    fetch='Needs the HMDB51 videos in data/hmdb51 and the split files in data/testTrainMulti_7030_splits, both from '
          'https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database/',
)
