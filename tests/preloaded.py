"""What the server that forks the processes of tests has imported, so that none of them has to."""

import gc

import pytest  # noqa: F401
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor.parallel  # noqa: F401

import tests.application  # noqa: F401

gc.freeze()  # or each process copies it all in its first full collection
