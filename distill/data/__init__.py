"""Data: sources, their order, loading, and a cache of what the frozen encoders make of them."""

from distill.data.bad_records import GoodRecords, jsonl_log
from distill.data.cache import LatentCache
from distill.data.folder import image_folder
from distill.data.images import ImageBatches
from distill.data.laion import laion_list
from distill.data.loader import Loader
from distill.data.memory import digits, mnist
from distill.data.order import batch_indices
from distill.data.records import BadRecord, Record, Source
from distill.data.sources import open_source
from distill.data.tables import parquet

__all__ = [
    "BadRecord",
    "GoodRecords",
    "ImageBatches",
    "LatentCache",
    "Loader",
    "Record",
    "Source",
    "batch_indices",
    "digits",
    "image_folder",
    "jsonl_log",
    "laion_list",
    "mnist",
    "open_source",
    "parquet",
]
