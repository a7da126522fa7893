"""FineGym's Gym99, classes by id, from the thesis. Recipe: thesis, Table 4.9."""

config = dict(
    dataset='gym99',
    data_root='data/gym99',
    annotations='data/gym99_lists',
    max_iters=15000,
    eval_interval=1000,
    shot=1,
    flip=False,
    norm='imagenet',
    splits=dict(
        train=[
            0, 2, 3, 4, 6, 7, 9, 11, 12, 13, 14, 15, 16, 17, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 33, 34, 35, 36, 37, 38,
            40, 41, 43, 44, 46, 47, 48, 49, 53, 55, 58, 59, 68, 70, 71, 72, 73, 74, 75, 78, 80, 83, 84, 85, 86, 87, 88, 89,
            90, 91, 92, 93, 94,
        ],
        val=[
            10, 19, 32, 56, 57, 62, 66, 69, 79, 82, 95, 96,
        ],
        test=[
            1, 5, 8, 18, 20, 31, 39, 42, 45, 50, 51, 52, 54, 60, 61, 63, 64, 65, 67, 76, 77, 81, 97, 98,
        ],
    ),
    fetch='''FineGym: https://sdolivia.github.io/FineGym/. Expected:
  data/gym99/                   a video for each element, named as in the lists (A0xA..._E_..._A_....mp4), in any folders
  data/gym99_lists/             gym99_train_element_v1.0.txt, gym99_val_element.txt; gym99_categories.txt names the classes
Elsewhere: --data_root=... --annotations=...''',
)
