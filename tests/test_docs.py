"""The documentation is true: blocks of Python run and print what the pages say, and links lead somewhere.

This file is also the process that runs the blocks: `Runner` starts it. That process has imported PyTorch and the
package, and runs each block in a child of its own, with nothing defined: so a block runs where it is pasted alone, and
no block waits for the imports. There, on a machine without a GPU, the functions take the CPU path, as for a user.
"""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import traceback
import types

ROOT = pathlib.Path(__file__).parent.parent
PYTHON_PAGES = ['README.md', 'README.zh-CN.md', 'docs/*.md']
LINKED_PAGES = [*PYTHON_PAGES, 'CONTRIBUTING.md', 'ARCHITECTURE.md', 'CHANGELOG.md']
README_WORDS = 1500
TIMEOUT = 300  # seconds for a block: the first calls on a GPU compile kernels


def run_child(request: dict, output: io.BufferedRandom) -> None:
    """Run the code of a request as `python` runs a script, and exit. All that it prints goes to the file."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the other requests are not for the block to read
    os.dup2(output.fileno(), 1)
    module = types.ModuleType('__main__')
    sys.modules['__main__'] = module
    signal.alarm(TIMEOUT)
    code = 1
    try:
        # The lines before the block are empty, so that a traceback shows the lines of the page.
        exec(compile('\n' * request['line'] + request['code'], request['path'], 'exec'), module.__dict__)
        code = 0
    except BaseException:
        traceback.print_exc(file=sys.stdout)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(code)


def serve() -> None:
    """Run the requests of standard input, one JSON object to a line, and answer each with its result."""
    import torch

    import fla_simple_gla  # noqa: F401

    torch.manual_seed(0)
    for line in sys.stdin:
        with tempfile.TemporaryFile() as output:
            child = os.fork()
            if child == 0:
                run_child(json.loads(line), output)
            _, status = os.waitpid(child, 0)
            output.seek(0)
            result = {'code': os.waitstatus_to_exitcode(status), 'output': output.read().decode(errors='replace')}
        print(json.dumps(result), flush=True)


if __name__ == '__main__':
    serve()
    sys.exit()

import pytest  # noqa: E402
import torch  # noqa: E402

import fla_simple_gla  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page, and what the page says that it prints."""

    path: str
    line: int  # of the opening fence, from 1
    code: str
    expected: str = ''


def pages(patterns: list[str]) -> list[pathlib.Path]:
    """The files that exist. Not all of them are in every archive of the sources."""
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def blocks_of(text: str, path: str = '') -> list[Block]:
    """The blocks of Python in a page, each with the block of text that follows it, if one does."""
    found: list[Block] = []
    language, start, lines = None, 0, []
    may_follow = False  # whether only empty lines stand between the last block of Python and this line
    for number, line in enumerate(text.splitlines(), 1):
        fence = re.match(r' *(```+|~~~+)(.*)', line)
        if language is None and fence:
            language, start, lines = fence[2].strip(), number, []
        elif language is None:
            may_follow &= not line.strip()
        elif not fence or fence[2]:
            lines.append(line)
        else:
            content = textwrap.dedent('\n'.join(lines)) + '\n'
            if language == 'python':
                found.append(Block(path, start, content))
            elif language == 'text' and may_follow:
                found[-1] = dataclasses.replace(found[-1], expected=content)
            elif language.lower().startswith(('py', '{code')):
                raise AssertionError(f'{path}:{start}: a block of Python begins with ```python, got {language!r}')
            may_follow, language = language == 'python', None
    assert language is None, f'{path}:{start}: the block does not end'
    return found


def without_code(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r'^ *(```+|~~~+).*?^ *\1 *$', '', text, flags=re.DOTALL | re.MULTILINE)


BLOCKS = [
    block
    for path in pages(PYTHON_PAGES)
    for block in blocks_of(path.read_text(encoding='utf-8'), path.relative_to(ROOT).as_posix())
]


class Runner:
    """Runs blocks in another process, without Triton's interpreter."""

    def __init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
        environment['PYTHONPATH'] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
        command, pipe = [sys.executable, __file__], subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True)

    def result(self, block: Block) -> dict:
        """The exit code, which is negative for a signal, and the output."""
        self.process.stdin.write(json.dumps(dataclasses.asdict(block)) + '\n')
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, 'the process that runs the blocks has ended'
        return json.loads(answer)

    def problem(self, block: Block) -> str | None:
        """What is wrong with a block; None if it runs and prints what the page says."""
        result = self.result(block)
        if result['code']:
            return f'it ended with {result["code"]}:\n{result["output"]}'
        if result['output'] == block.expected:
            return None
        return f'it prints\n\n{result["output"]}\nand the text block after it says\n\n{block.expected}'


@pytest.fixture(scope='module')
def runner():
    if not hasattr(os, 'fork'):
        pytest.skip('runs blocks in forked processes')
    runner = Runner()
    yield runner
    runner.process.stdin.close()
    runner.process.wait(timeout=60)


@pytest.mark.parametrize('block', [pytest.param(block, id=f'{block.path}:{block.line}') for block in BLOCKS])
def test_block_prints_what_the_page_says(block, runner):
    problem = runner.problem(block)
    assert problem is None, f'{block.path}:{block.line}: {problem}'


@pytest.mark.parametrize('name', fla_simple_gla.__all__)
def test_docstring_example(name, runner):
    function = f'fla_simple_gla.{name}'
    assert '>>> ' in getattr(fla_simple_gla, name).__doc__
    code = f'import doctest, fla_simple_gla\ndoctest.run_docstring_examples({function}, {{}}, name={name!r})\n'
    problem = runner.problem(Block(name, 1, code))
    assert problem is None, problem


@pytest.mark.parametrize(
    'page, problem',
    [
        ('```python\nprint(1)\n```\n\n```text\n1\n```', None),
        ('```python\nx = 1\n```\n\nIt prints\n\n```text\n1\n```', None),
        ('```python\nprint(1)\n```\n\n```text\n2\n```', 'it prints\n\n1\n\nand'),
        ('```python\nprint(1)\n```', 'it prints'),
        ('```python\nx = 1\n```\n\n```text\n1\n```', 'it prints'),
        ('```python\n\nprint(x)\n```', 'line 3.*\n(.*\n)?NameError'),
        ('```python\nx = 1\n```\n```python\nprint(x)\n```', 'NameError'),
        ('```python\nimport sys\nsys.exit(3)\n```', 'SystemExit: 3'),
        ('```python\nimport os\nos.kill(os.getpid(), 9)\n```', 'ended with -9'),
        ('- a list\n\n  ```python\n  for i in range(2):\n      print(i)\n  ```\n\n  ```text\n  0\n  1\n  ```', None),
    ],
)
def test_wrong_blocks_are_found(page, problem, runner):
    """The test of the pages can fail."""
    found = [runner.problem(block) for block in blocks_of(page)]
    if problem is None:
        assert found == [None]
    else:
        assert re.search(problem, found[-1])


def test_blocks_run_as_for_a_user(runner):
    """They do not run in Triton's interpreter, and each begins with the same random numbers, in every run."""
    code = 'import os\nimport torch\nprint("TRITON_INTERPRET" in os.environ, torch.rand(1).item())\n'
    expected = f'False {torch.rand(1, generator=torch.Generator().manual_seed(0)).item()}\n'
    assert [runner.result(Block('', 1, code))['output'] for _ in range(2)] == [expected] * 2


def anchors(path: pathlib.Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page, and those that the page has itself."""
    text = without_code(path.read_text(encoding='utf-8'))
    found: list[str] = []
    for heading in re.findall(r'^#{1,6} +(.*?) *$', text, re.MULTILINE):
        words = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', heading).lower()
        slug = re.sub(r'[^\w\- ]', '', words).replace(' ', '-')
        count = found.count(slug)
        found.append(f'{slug}-{count}' if count else slug)
    return {*found, *re.findall(r'<a (?:id|name)="([^"]+)"', text)}


def links(text: str) -> list[str]:
    """The targets of links and pictures that are in this project."""
    text = re.sub(r'(`+)[^`].*?\1', '', without_code(text))
    found = re.findall(r'\]\(<?([^)\s>]+)', text) + re.findall(r'(?:href|src|srcset)="([^"]+)"', text)
    found += re.findall(r'^\[[^\]]+\]: +(\S+)', text, re.MULTILINE)
    return [target for target in found if not re.match(r'[a-z]+:', target)]


@pytest.mark.parametrize(
    'path', [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in pages(LINKED_PAGES)]
)
def test_links_lead_somewhere(path):
    """Links to files of this project, and to headings of pages."""
    for target in links(path.read_text(encoding='utf-8')):
        name, _, anchor = target.partition('#')
        linked = path.parent / name if name else path
        assert linked.exists(), f'{path.name} links to {target}, which is not there'
        if anchor:
            assert linked.suffix == '.md', f'{path.name} links to {target}, which is no page with headings'
            assert anchor in anchors(linked), f'{path.name} links to {target}: {linked.name} has no such heading'


def test_links_are_found():
    text = '# A `b` c\n[x](y.md#z) ![p](<p q.svg>) `[no](n)` <img src="s.svg"> [w](https://w)\n```text\n[n](n)\n```\n'
    assert links(text) == ['y.md#z', 'p', 's.svg']


def test_readme_is_short():
    """All words count, but for those in blocks of code."""
    words = without_code((ROOT / 'README.md').read_text(encoding='utf-8')).split()
    assert len(words) <= README_WORDS, f'README.md has {len(words)} words'
