"""One command for all benchmarks.

    python -m benchmarks run --shape 4 4096 64 128 --fla --attention
    python -m benchmarks COMMAND --help

Those that measure need a CUDA GPU. They print a table, and with --out FILE.jsonl or FILE.csv they write every row to a
file too, with the GPU, the versions and the commit. `report` makes the tables and pictures of README.md and docs/ from
such files.
"""

import argparse
import importlib
import signal

from . import measuring

COMMANDS = {
    'run': 'the modes, forward and backward, beside fla-core and attention',
    'models': 'chunk, and the functions of Mamba-2, at the dims of models, beside mamba_ssm and fla-core',
    'shapes': 'chunk over lengths and dims, to find shapes that cost more than their neighbours',
    'decode': 'a decode step from a pool of states',
    'host': 'how long a call keeps the host',
    'compiled': 'a training step, eager and under torch.compile',
    'training': 'a training step and decoding of a Mamba-2 model of transformers, patched and as it is',
    'accuracy': 'errors against naive in fp64',
    'kernels': 'registers, spills and shared memory of the kernels; needs no GPU',
    'same_bits': 'the results of another checkout, bit by bit',
    'report': 'tables and pictures of README.md and docs/ from result files; needs no GPU',
}
NEED_NO_GPU = ('kernels', 'report')


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog='python -m benchmarks', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = found.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f'.{name}', __package__)
        command = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_options(command)
        command.set_defaults(main=module.main)
    return found


def main() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `python -m benchmarks ... | head` is no error
    options = parser().parse_args()
    if options.command not in NEED_NO_GPU:
        measuring.require_gpu()
    options.main(options)


if __name__ == '__main__':
    main()
