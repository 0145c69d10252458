"""This library's kernels under the names by which models call the operator.

    adapters.mamba_ssm    the functions of mamba_ssm that Mamba-2 models call
    adapters.fla          retention and lightning attention of flash-linear-attention

The package itself imports nothing from here, and importing this changes nothing. `patch` puts the functions in the
place of those that models call, `unpatch` takes them out again.
"""

from ._patch import patch, unpatch

__all__ = ['patch', 'unpatch']
