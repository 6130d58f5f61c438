# SPDX-License-Identifier: MIT
"""Warnings are errors here too. These are the frameworks' own, about themselves or the machine."""

import torch

IGNORED = [
    # PyTorch 2.13, on import of torch.distributed.optim
    r"ignore:`torch\.jit\.\w+` is deprecated:DeprecationWarning",
    # Lightning
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",
    r"ignore:The number of training batches .* is smaller than the logging interval",
    r"ignore:The 'train_dataloader' does not have many workers",
    r"ignore:Starting from v1\.9\.0, `tensorboardX` has been removed",
    # fastai's lr_find
    r"ignore:numpy\.core is deprecated:DeprecationWarning",
    # Trainer, without a GPU
    r"ignore:'pin_memory' argument is set as true but no accelerator is found:UserWarning",
]


def pytest_configure(config):
    torch.set_num_threads(1)  # The models are tiny; on a busy machine threads wait for each other.
    for line in IGNORED:
        config.addinivalue_line("filterwarnings", line)
