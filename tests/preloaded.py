"""What the server that forks the processes of tests has imported and read, so that none of them has to."""

import gc

import pytest  # noqa: F401
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor.parallel  # noqa: F401

from ddp_streammon.train.data.mfeat import labels, views
from tests.application import EVERYTHING, SMALL, composed

composed([*SMALL, *EVERYTHING])  # Hydra's parsers learn their grammar as they read
views(), labels()

gc.set_threshold(10_000, 20, 20)  # what torch does at first use makes many objects and hardly any garbage
gc.freeze()  # or each process copies it all in its first full collection
