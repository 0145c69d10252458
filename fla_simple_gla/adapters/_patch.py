"""Puts the functions of this library in the place of those that models call, and takes them out again.

A model holds such a function in one of two ways:

- By a name of a module. Each name that holds the original gets ours, in any module.
- In a wrapper of transformers, which its decorator `use_kernel_func_from_hub_with_fallback` puts around functions of
  models. When the model is imported, the decorator looks for an implementation in mamba_ssm, and the wrapper keeps what
  has been found. The wrapper stays where it is, and gets our implementation, so that all who hold the wrapper have
  ours. And the decorator is replaced by one whose wrappers get ours at once.

A target is imported and checked before anything of it is replaced. `patched` knows what has been replaced. Nothing here
is made for threads that patch at the same time.
"""

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from types import CellType, FunctionType, ModuleType
from typing import Any, NamedTuple

from .. import chunk_simple_gla, fused_chunk_simple_gla, fused_recurrent_simple_gla, parallel_simple_gla
from . import fla, mamba_ssm

# Our functions, by the modules in which those are found that they replace
FUNCTIONS: dict[str, dict[str, tuple[Callable, ...]]] = {
    'fla': {
        'fla.ops.simple_gla': (
            chunk_simple_gla,
            fused_chunk_simple_gla,
            fused_recurrent_simple_gla,
            parallel_simple_gla,
        ),
        'fla.ops.retention': (
            fla.chunk_retention,
            fla.fused_chunk_retention,
            fla.fused_recurrent_retention,
            fla.parallel_retention,
        ),
        'fla.ops.lightning_attn': (fla.chunk_lightning_attn, fla.fused_recurrent_lightning_attn),
    },
    'mamba_ssm': {
        'mamba_ssm.ops.triton.ssd_combined': (
            mamba_ssm.mamba_chunk_scan_combined,
            mamba_ssm.mamba_split_conv1d_scan_combined,
        ),
        'mamba_ssm.ops.triton.selective_state_update': (mamba_ssm.selective_state_update,),
    },
}
TARGETS = (*FUNCTIONS, 'transformers')
# The first and the last version of each target that has been tested
TESTED = {'fla': ('0.6', '0.6'), 'mamba_ssm': ('2.3', '2.3'), 'transformers': ('5.17', '5.24')}

# Those that models of transformers look for in mamba_ssm
WRAPPED: dict[str, Callable] = {name: getattr(mamba_ssm, name) for name in mamba_ssm.__all__}
DECORATOR = 'use_kernel_func_from_hub_with_fallback'
DECORATOR_MODULE = 'transformers.integrations.hub_kernels'

PACKAGE = __name__.split('.')[0]
# The names of a module. One that loads what it is asked for may have a `__dict__` of its own, which loads everything.
names_of: Callable[[ModuleType], dict[str, Any]] = vars(ModuleType)['__dict__'].__get__


class Skipped(Exception):
    """Why a target is left as it is."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What a call of `patch` has done. As a context manager it takes out on exit what that call has put in."""

    versions: dict[str, str] = dataclasses.field(default_factory=dict)  # of the targets that the call has patched
    # for each of these targets and each function, the modules that have ours now
    replaced: dict[str, dict[str, list[str]]] = dataclasses.field(default_factory=dict)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)  # targets and functions, and why they are not
    notes: dict[str, str] = dataclasses.field(default_factory=dict)  # targets, and what else to know of them

    def __enter__(self) -> 'Report':
        return self

    def __exit__(self, *error: object) -> None:
        if self.replaced:
            unpatch(*self.replaced)

    def __str__(self) -> str:
        lines = []
        for target, functions in self.replaced.items():
            lines.append(f'{target} {self.versions[target]} is patched:')
            later = ['every model that is imported from now on'] if target == 'transformers' else []
            lines += [f'    {name} in {", ".join(modules + later)}' for name, modules in functions.items()]
        lines += self.notes.values()
        lines += [f'skipped: {why}' for why in self.skipped.values()]
        return '\n'.join(lines)


class Swap(NamedTuple):
    """One of our functions in the place of another."""

    original: Any
    ours: Any
    package: str | None  # modules of this package get ours by this swap alone; None if all modules do
    places: list[tuple[dict[str, Any], str]]  # the names of a module, and one of these
    others: list[tuple[dict[str, Any], str]]  # those that had ours before


class Implementation(NamedTuple):
    """What a wrapper of transformers calls. The names are those of its variables."""

    implementation: Callable
    applicable_params: tuple[str, ...]  # its parameters: the wrapper drops other keywords
    is_new_implementation: bool  # whether it is not the function in PyTorch that is wrapped


class Wrapper:
    """A wrapper of transformers."""

    def __init__(self, variables: dict[str, CellType]):
        self.name, self.package = (variables[name].cell_contents for name in ('func_name', 'package'))
        self.cells = [variables[name] for name in Implementation._fields]

    def get(self) -> Implementation:
        return Implementation(*(cell.cell_contents for cell in self.cells))

    def set(self, implementation: Implementation) -> None:
        for cell, content in zip(self.cells, implementation):
            cell.cell_contents = content


class Patched(NamedTuple):
    """What has been replaced for a target: names of modules, and wrappers that had another implementation."""

    swaps: list[Swap]
    wrappers: list[tuple[Wrapper, Implementation]]

    def put_in(self, wrapper: Wrapper) -> None:
        found, ours = wrapper.get(), WRAPPED[wrapper.name]
        if found.implementation is ours and 'mamba_ssm' in patched:
            # The model was imported after mamba_ssm was patched.
            found = implementation_of(patched['mamba_ssm'].originals()[ours])
        if found.implementation is not ours:
            self.wrappers.append((wrapper, found))
            wrapper.set(implementation_of(ours))

    def originals(self) -> dict[Callable, Callable]:
        return {swap.ours: swap.original for swap in self.swaps}


# By target
patched: dict[str, Patched] = {}


def patch(*targets: str) -> Report:
    """Let models that are written for other libraries call this one.

    The targets:

    - 'fla': all functions of `fla.ops.simple_gla`, `fla.ops.retention` and `fla.ops.lightning_attn` of
      flash-linear-attention. Its linear attention calls the first, and is computed by this library too.
    - 'mamba_ssm': `mamba_chunk_scan_combined`, `mamba_split_conv1d_scan_combined` and `selective_state_update`.
    - 'transformers': the same three where its models look for them in mamba_ssm, which need not be installed. Models
      of Mamba-2 (Mamba2, NemotronH, Bamba, FalconH1, GraniteMoeHybrid, Zamba2) then train and generate with this
      library. Models of Mamba-1 (Mamba, Jamba, FalconMamba, Zamba) have `selective_state_update` alone of the three,
      and generate with it. `torch.export` still takes transformers' functions in PyTorch. A model that takes kernels of
      the hub (`use_kernels=True`) still takes these.

    Every module has ours then that had the original, under whatever name, and every module that imports it later.
    Installed targets are imported. A target that is not installed, that cannot be imported, or that is too old is
    skipped. So is a function that has parameters which ours lacks. Nothing that is skipped is changed, and the report
    says why. fla 0.6, mamba_ssm 2.3 and transformers 5.17 to 5.24 have been tested: with others the report says so. A
    target that is patched already stays as it is. Do not patch while other threads import or call what is replaced.

    Args:
        targets: any of 'fla', 'mamba_ssm' and 'transformers'. Default: all.

    Returns:
        A report. `print` it to read what was replaced and what was skipped. `with patch(...)` takes out on exit what
        this call has put in.

    Raises:
        ValueError: there is no such target.

    Example::

        >>> from fla_simple_gla.adapters import patch
        >>> with patch('transformers') as report:
        ...     skipped = report.skipped  # models call this library here
    """
    check_targets(targets)
    report = Report()
    for target in dict.fromkeys(targets or TARGETS):
        if target in patched:
            report.notes[target] = f'{target} is patched already'
            continue
        try:
            version = version_of(target)
            if target == 'transformers':
                replaced = patch_transformers(version)
            else:
                replaced = patch_functions(target, version, report.skipped)
        except Skipped as why:
            report.skipped[target] = str(why)
            continue
        report.versions[target], report.replaced[target] = version, replaced
        first, last = TESTED[target]
        if not numbers(first) <= numbers(version) <= numbers(last):
            tested = first if first == last else f'{first} to {last}'
            report.notes[target] = f'{target} {version} has not been tested with this library, {tested} has'
    return report


def unpatch(*targets: str) -> None:
    """Take out what `patch` has put in.

    Every module gets back what it had. Modules of fla, of mamba_ssm and models of transformers that were imported in
    between get the original. Other modules that have imported a function of fla or of mamba_ssm in between keep ours. A
    target that is not patched stays as it is.

    Args:
        targets: any of 'fla', 'mamba_ssm' and 'transformers'. Default: all.

    Raises:
        ValueError: there is no such target.
    """
    check_targets(targets)
    for target in targets or TARGETS:
        if target not in patched:
            continue
        found = patched.pop(target)
        take_out(found.swaps)
        for wrapper, before in found.wrappers:
            if wrapper.get().implementation is WRAPPED[wrapper.name]:
                wrapper.set(before)
        if target == 'mamba_ssm' and 'transformers' not in patched:
            # Models that were imported in between have found ours in mamba_ssm.
            originals = found.originals()
            for _, wrapper in wrappers():
                ours = wrapper.get().implementation
                if ours in originals:
                    wrapper.set(implementation_of(originals[ours]))


def check_targets(targets: tuple[str, ...]) -> None:
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f'targets must be among {", ".join(map(repr, TARGETS))}, got {target!r}')


def patch_functions(target: str, version: str, skipped: dict[str, str]) -> dict[str, list[str]]:
    """For each function of fla or mamba_ssm the modules that have ours now. `skipped` gets the others."""
    swaps, others = {}, {}
    for module_name, functions in FUNCTIONS[target].items():
        module = find_module(module_name)
        for ours in functions:
            name = f'{module_name}.{ours.__name__}'
            original = getattr(module, ours.__name__, None)
            if original is None:
                others[name] = f'{target} {version} has no {name}'
            elif original is ours:
                others[name] = f"{name} is this library's without a patch"
            elif (why := difference(original, ours)) is not None:
                others[name] = f'{name} of {target} {version} {why}'
            else:
                swaps[ours.__name__] = Swap(original, ours, target, [], [])
    skipped.update(others)
    if not swaps:
        raise Skipped(f'{target} {version} has none of the functions that this library replaces')
    patched[target] = Patched([*swaps.values()], [])
    return dict(zip(swaps, put_in(patched[target].swaps)))


def patch_transformers(version: str) -> dict[str, list[str]]:
    """For each function the modules of models that have ours now."""
    original = getattr(find_module(DECORATOR_MODULE), DECORATOR, None)
    if original is None:
        raise Skipped(f'transformers {version} has no {DECORATOR}: 5.17 or newer is needed')
    try:
        # A function of which no other implementation is found, to see what the wrapper is like
        wrapper = wrapper_of(original(next(iter(WRAPPED)), PACKAGE)(lambda x: x))
    except Exception:
        wrapper = None
    if wrapper is None:
        raise Skipped(f'transformers {version} has another {DECORATOR} than those that are known here')
    found = [*wrappers()]
    modules: dict[str, list[str]] = {name: [] for name in WRAPPED}
    state = patched['transformers'] = Patched([], [])
    state.swaps.append(Swap(original, decorator_for(original, state), None, [], []))
    put_in(state.swaps)
    for module, wrapper in found:
        state.put_in(wrapper)
        modules[wrapper.name].append(module)
    return modules


def decorator_for(original: Callable, state: Patched) -> Callable:
    """The decorator of transformers, whose wrappers call ours."""

    @functools.wraps(original)
    def decorator_of(*args: Any, **kwargs: Any) -> Callable:
        decorator = original(*args, **kwargs)

        def decorate(torch_function: Callable) -> Any:
            decorated = decorator(torch_function)
            wrapper = wrapper_of(decorated)
            if wrapper is not None and is_replaced(wrapper) and patched.get('transformers') is state:
                state.put_in(wrapper)
            return decorated

        return decorate

    return decorator_of


def wrapper_of(x: Any) -> Wrapper | None:
    """The wrapper that x is, or that is called by x, a module of PyTorch that the package kernels makes of functions.

    None for all else.
    """
    if 'kernel_layer_name' in vars(type(x)):
        inner = variables_of(vars(type(x)).get('forward'))
        x = inner['func'].cell_contents if 'func' in inner else None
    variables = variables_of(x)
    if not variables.keys() >= {'func_name', 'package', *Implementation._fields}:
        return None
    return Wrapper(variables) if x.__globals__ is names_of(sys.modules[DECORATOR_MODULE]) else None


def variables_of(x: Any) -> dict[str, CellType]:
    """The variables that a function has from around it; none for all else."""
    return dict(zip(x.__code__.co_freevars, x.__closure__ or ())) if type(x) is FunctionType else {}


def is_replaced(wrapper: Wrapper) -> bool:
    return wrapper.package == 'mamba_ssm' and wrapper.name in WRAPPED


def wrappers() -> Iterator[tuple[str, Wrapper]]:
    """The wrappers that get our implementations, with the names of the modules that hold them."""
    if DECORATOR_MODULE in sys.modules:
        for module, _, _, value in names_in_modules():
            wrapper = wrapper_of(value)
            if wrapper is not None and is_replaced(wrapper):
                yield module, wrapper


def put_in(swaps: list[Swap]) -> list[list[str]]:
    """Put ours in all places. For each swap the modules that have ours now."""
    originals: dict[int, tuple[Swap, dict[str, None]]] = {id(swap.original): (swap, {}) for swap in swaps}
    ours = {id(swap.ours): swap for swap in swaps}
    for module, names, name, value in names_in_modules():
        if id(value) in originals:
            swap, modules = originals[id(value)]
            names[name] = swap.ours
            swap.places.append((names, name))
            modules[module] = None
        elif id(value) in ours:
            ours[id(value)].others.append((names, name))
    return [[*modules] for _, modules in originals.values()]


def take_out(swaps: list[Swap]) -> None:
    """Give back the originals."""
    ours = {id(swap.ours): swap for swap in swaps}
    for module, names, name, value in names_in_modules():
        swap = ours.get(id(value))
        if swap is None or swap.package not in (None, module.split('.')[0]):
            continue
        if not any(names is others and name == its for others, its in swap.others):
            swap.places.append((names, name))
    for swap in swaps:
        for names, name in swap.places:
            if names.get(name) is swap.ours:
                names[name] = swap.original


def implementation_of(function: Callable) -> Implementation:
    return Implementation(function, tuple(inspect.signature(function).parameters), True)


def names_in_modules() -> Iterator[tuple[str, dict[str, Any], str, Any]]:
    """All modules but those of this package: `module, names, name, value`. Names may be set in between."""
    seen = set()
    for module_name, module in [*sys.modules.items()]:
        # The type is asked, because an object in the place of a module may pretend to be one.
        if module_name.split('.')[0] == PACKAGE or not issubclass(type(module), ModuleType):
            continue
        names = names_of(module)
        if id(names) not in seen:
            seen.add(id(names))
            for name, value in [*names.items()]:
                yield module_name, names, name, value


def version_of(target: str) -> str:
    """The version of a target, which is imported."""
    is_there = target in sys.modules or importlib.util.find_spec(target) is not None
    module = find_module(target) if is_there else None
    if module is None:
        raise Skipped(f'{target} is not installed')
    return str(getattr(module, '__version__', 'of an unknown version'))


def find_module(name: str) -> ModuleType | None:
    """A module of a target, which is imported; None if the target has none of this name."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # what a compiled extension raises may be of any kind
        if isinstance(error, ModuleNotFoundError) and error.name and f'{name}.'.startswith(f'{error.name}.'):
            return None
        target = name.split('.')[0]
        raise Skipped(f'{target} cannot be imported: {type(error).__name__}: {error}') from error


def numbers(version: str) -> list[int]:
    """Major and minor version; empty if there are none."""
    found = re.match(r'(\d+)\.(\d+)', version)
    return [] if found is None else [*map(int, found.groups())]


def difference(original: Callable, ours: Callable) -> str | None:
    """Why ours cannot be called as the original can; None if it can."""
    try:
        parameters = inspect.signature(original).parameters.values()
    except (TypeError, ValueError):
        return 'has no signature'
    known = list(inspect.signature(ours).parameters)
    names = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    unknown = [name for name in names if name not in known]
    if not names or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return 'has a signature that does not tell its parameters'
    if unknown:
        return f'has parameters that this library does not know: {", ".join(unknown)}'
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if positional != known[: len(positional)]:
        return 'has its parameters in another order'
    return None
