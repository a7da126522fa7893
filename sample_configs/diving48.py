"""Diving48 V2, classes by id, from the thesis (id 30 has no video). Recipe: thesis, Table 4.9."""

config = dict(
    dataset='diving48',
    data_root='data/diving48',
    annotations='data/diving48_lists',
    max_iters=15000,
    eval_interval=1000,
    shot=1,
    flip=False,
    norm='imagenet',
    splits=dict(
        train=[
            0, 1, 2, 3, 7, 8, 10, 13, 15, 17, 20, 21, 22, 23, 24, 25, 26, 29, 32, 34, 35, 37, 38, 41, 42, 45, 46,
        ],
        val=[
            4, 11, 14, 16, 28, 31, 33, 36, 39, 47,
        ],
        test=[
            5, 6, 9, 12, 18, 19, 27, 40, 43, 44,
        ],
    ),
    fetch='''Diving48: http://www.svcl.ucsd.edu/projects/resound/dataset.html. Expected:
  data/diving48/                <vid_name>.mp4, in any folders
  data/diving48_lists/          Diving48_V2_train.json, Diving48_V2_test.json; Diving48_vocab.json names the classes
Elsewhere: --data_root=... --annotations=...''',
)
