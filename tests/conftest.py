"""Where there is no GPU the kernels run in Triton's interpreter, which has to be said before triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'
    # the interpreter's many small operations gain nothing from threads
    torch.set_num_threads(1)
