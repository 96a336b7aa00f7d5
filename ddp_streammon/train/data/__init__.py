"""Data sources: each is a function that returns a `StreamData`."""

from ddp_streammon.train.data.base import StreamData
from ddp_streammon.train.data.htad import htad
from ddp_streammon.train.data.mfeat import mfeat, mfeat_pixels
from ddp_streammon.train.data.paired_folders import paired_folders
from ddp_streammon.train.data.splits import stratified
from ddp_streammon.train.data.synthetic import synthetic

__all__ = ["StreamData", "htad", "mfeat", "mfeat_pixels", "paired_folders", "stratified", "synthetic"]
