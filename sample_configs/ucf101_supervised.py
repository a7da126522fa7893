"""UCF101, all 101 classes, split 1. Recipe: Efficient-Prompt's, as its code has it for HMDB51; its rate never falls."""

config = dict(
    dataset='ucf101_supervised',
    data_root='data/ucf101',
    annotations=dict(train=['data/ucfTrainTestlist/trainlist01.txt', 'data/ucfTrainTestlist/classInd.txt'],
                     test='data/ucfTrainTestlist/testlist01.txt'),
    closed_set=True,
    holdout=dict(val=0.1, test=0.0),
    method='efficient_prompt',
    frames=16,
    meta_batch=64,
    max_iters=1100,
    lr=1e-4,
    weight_decay=0.01,
    grad_clip=0.0,
    augment='none',
    flip=False,
    views=5,
    fetch='Needs the UCF101 videos in data/ucf101 and its lists of recognition splits in data/ucfTrainTestlist, both from '
          'https://www.crcv.ucf.edu/data/UCF101.php',
)
