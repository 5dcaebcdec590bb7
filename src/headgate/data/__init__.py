"""Data: readers for the public formats, seeds and streams, and worlds that need no download.

The package ``scenes`` holds the procedural picture world. Importing this package is cheap: scikit-learn, pyarrow and pillow are imported by the reader that needs them, when called.
"""

from __future__ import annotations

from headgate.data.cifar import (
    CIFAR10_CLASSES,
    CIFAR10_MEAN,
    CIFAR10_STD,
    CIFAR100_CLASSES,
    CIFAR100_COARSE_CLASSES,
    CIFAR100_MEAN,
    CIFAR100_STD,
    Cifar,
    random_crop_flip,
)
from headgate.data.click_log import (
    CLICK_LOG_PRESETS,
    ClickItems,
    ClickLog,
    ClickLogSettings,
    ClickUsers,
    Impressions,
    make_click_log,
)
from headgate.data.digits import DigitImages, load_digits_images
from headgate.data.folders import data_folder
from headgate.data.graphs import GraphBatch, GraphSet, coloured_graphs, moon_graphs, star_graphs
from headgate.data.hourly_series import hourly_series
from headgate.data.interactions import Histories, Interactions, InteractionSplits, Items, read_movielens
from headgate.data.recall import IGNORED, RecallData, frequent_bigrams, mqar, query_distance, recall_mask
from headgate.data.seeding import portable_normal, splitmix64, splitmix64_array, stream_generator
from headgate.data.series import (
    ETT_COLUMNS,
    SeriesScaler,
    SeriesSplits,
    SeriesWindow,
    SeriesWindows,
    TimeSeries,
    chronological_splits,
    ett_splits,
    read_ett,
    read_series,
    time_features,
)
from headgate.data.text import (
    CharTokenizer,
    Corpus,
    TextWindows,
    python_documentation,
    read_rows,
    read_text,
    split_by_position,
)
from headgate.data.tu_graphs import degree_features, fold_split, read_folds, read_tu

__all__ = [
    "CIFAR10_CLASSES",
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "CIFAR100_CLASSES",
    "CIFAR100_COARSE_CLASSES",
    "CIFAR100_MEAN",
    "CIFAR100_STD",
    "CLICK_LOG_PRESETS",
    "ETT_COLUMNS",
    "IGNORED",
    "CharTokenizer",
    "Cifar",
    "ClickItems",
    "ClickLog",
    "ClickLogSettings",
    "ClickUsers",
    "Corpus",
    "DigitImages",
    "GraphBatch",
    "GraphSet",
    "Histories",
    "Impressions",
    "InteractionSplits",
    "Interactions",
    "Items",
    "RecallData",
    "SeriesScaler",
    "SeriesSplits",
    "SeriesWindow",
    "SeriesWindows",
    "TextWindows",
    "TimeSeries",
    "chronological_splits",
    "coloured_graphs",
    "data_folder",
    "degree_features",
    "ett_splits",
    "fold_split",
    "frequent_bigrams",
    "hourly_series",
    "load_digits_images",
    "make_click_log",
    "moon_graphs",
    "mqar",
    "portable_normal",
    "python_documentation",
    "query_distance",
    "random_crop_flip",
    "read_ett",
    "read_folds",
    "read_movielens",
    "read_rows",
    "read_series",
    "read_text",
    "read_tu",
    "recall_mask",
    "split_by_position",
    "splitmix64",
    "splitmix64_array",
    "star_graphs",
    "stream_generator",
    "time_features",
]
