"""Without a GPU Triton kernels are interpreted. Triton reads this when it is first imported: so, first of all."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
