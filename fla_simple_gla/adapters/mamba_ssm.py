"""The functions of mamba_ssm 2.3.2 that Mamba-2 models call, with its parameters, computed by this library."""

from ._scan import mamba_chunk_scan_combined
from ._split import mamba_split_conv1d_scan_combined
from ._step import selective_state_update

__all__ = ['mamba_chunk_scan_combined', 'mamba_split_conv1d_scan_combined', 'selective_state_update']
