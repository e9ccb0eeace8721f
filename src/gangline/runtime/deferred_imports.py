"""Import transformers without what it imports for other uses: compilers, several machines, offloading.

Much of the time that transformers takes to import goes into libraries that no model on one machine uses:
torch's compiler, sharded tensors with their symbolic algebra, accelerate. The modules that import these use
them inside functions only. So while :func:`deferred_imports` lasts, such a module gets a stand-in for each of
the names listed here, which imports the real thing when it is used, and as soon as anybody imports the real
module, every stand-in for its names makes way for the real ones. Who takes such a name from one of these
modules keeps a stand-in that works as the thing does; ``sys.modules`` has none.

Whatever is not as expected (another name, a module that is elsewhere or not there) is imported as it is.
"""

import builtins
import copyreg
import functools
import importlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.machinery import PathFinder
from importlib.util import resolve_name
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from gangline.runtime.imported import WATCH

# What may be deferred: of these modules these names, for what these packages import.
_FOR = ("transformers.", "torch.distributed.tensor.")
_DYNAMO = "torch._dynamo"
_NAMES = {
    "torch.fx.experimental.symbolic_shapes": {
        "GuardOnDataDependentSymNode",
        "guard_or_false",
        "guard_or_true",
        "statically_known_true",
    },
    "torch._dynamo._trace_wrapped_higher_order_op": {"TransformGetItemToIndex"},
    "torch.distributed._composable.fsdp": {"fully_shard"},
    "torch.distributed.fsdp": {"CPUOffloadPolicy", "FullyShardedDataParallel", "MixedPrecisionPolicy"},
    "torch.distributed.checkpoint.hf_storage": {"HuggingFaceStorageReader", "HuggingFaceStorageWriter"},
    "accelerate": {"PartialState", "dispatch_model"},
    "accelerate.hooks": {"AlignDevicesHook", "add_hook_to_module"},
    "accelerate.utils": {
        "extract_model_from_parallel",
        "get_balanced_memory",
        "get_max_memory",
        "infer_auto_device_map",
        "reduce",
    },
    "accelerate.utils.modeling": {"clean_device_map", "get_max_layer_size"},
}


_LOCK = threading.Lock()


class _Deferral:
    """How many defer now, what ``import`` does otherwise, and what is to be undone after the last."""

    depth = 0
    installed = False
    ordinary: Any = None
    stack: ExitStack


@contextmanager
def deferred_imports() -> Iterator[None]:
    """Defer what transformers needs only for other uses, whoever imports it meanwhile."""
    with _LOCK:
        if _Deferral.depth == 0:
            _Deferral.stack = ExitStack()
            _Deferral.stack.enter_context(_deferred_decorators())
            if not _Deferral.installed:
                _Deferral.ordinary, _Deferral.installed = builtins.__import__, True
                builtins.__import__ = _import_or_defer  # type: ignore[assignment]
        _Deferral.depth += 1
    try:
        yield
    finally:
        with _LOCK:
            _Deferral.depth -= 1
            if _Deferral.depth == 0:
                # Where somebody else has replaced it meanwhile, ours stays behind theirs and does nothing.
                if builtins.__import__ is _import_or_defer:
                    builtins.__import__, _Deferral.installed = _Deferral.ordinary, False
                _Deferral.stack.close()


def _import_or_defer(
    name: str,
    globals: dict[str, Any] | None = None,
    locals: Any = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> Any:
    if fromlist and globals is not None and _Deferral.depth:
        importer = globals.get("__name__")
        if isinstance(importer, str) and importer.startswith(_FOR):
            stand_ins = _stand_ins(name, globals, fromlist, level)
            if stand_ins is not None:
                return stand_ins
    return _Deferral.ordinary(name, globals, locals, fromlist, level)


# The stand-ins of each module by their names, until it is imported.
_MADE: dict[str, dict[str, "_StandIn"]] = {}


def _stand_ins(name: str, importer: dict[str, Any], wanted: Sequence[str], level: int) -> Any:
    """Return an object with all the wanted names, or None if this is to be imported."""
    if level:
        name = resolve_name("." * level + name, importer["__package__"])
    if name not in _NAMES or name in sys.modules or not _NAMES[name].issuperset(wanted):
        return None
    made = _MADE.get(name, {})
    missing = [each for each in wanted if each not in made]
    if missing:
        source = _source(name)
        if source is None or not all(each in source for each in missing):
            return None
        if name not in _MADE:
            WATCH.when_imported(name, _replace)
        made = _MADE.setdefault(name, made)
        made.update({each: _StandIn(each, (Exception,), {"__module__": name}) for each in missing})
    return SimpleNamespace(**{each: made[each] for each in wanted})


def _replace(imported: ModuleType) -> None:
    """Put a module's things wherever those who imported it, or from them, have stand-ins for them."""
    _MADE.pop(imported.__name__, None)

    def real(value: Any) -> Any:
        is_for_it = type(value) is _StandIn and value.__module__ == imported.__name__
        return getattr(imported, value.__name__) if is_for_it else value

    _put_in_modules(real)


def _put_in_modules(real: Callable[[Any], Any]) -> None:
    """Put ``real(thing)`` for each thing in the modules for which something may be deferred."""
    for name, module in list(sys.modules.items()):
        if f"{name}.".startswith(_FOR) and module is not None:
            for key, value in list(vars(module).items()):
                if real(value) is not value:
                    setattr(module, key, real(value))


def _source(name: str) -> str | None:
    """Return the text of a module without importing anything, None if it cannot be found."""
    path: Any = None
    spec = None
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        whole = ".".join(parts[:count])
        spec = getattr(sys.modules.get(whole), "__spec__", None) or PathFinder.find_spec(whole, path)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    if spec is None or spec.origin is None or not spec.has_location:
        return None
    try:
        return Path(spec.origin).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


class _StandIn(type):
    """A class that is another thing which is not imported yet, and becomes it when it is used.

    A class, and one of exceptions, so that it may stand wherever functions and classes do: in unions, as an
    argument of ``isinstance``, in an ``except`` clause.
    """

    def __new__(cls, name: str, bases: tuple[type, ...], names: dict[str, Any]) -> Any:
        if any(isinstance(base, _StandIn) for base in bases):  # somebody derives from it
            real = tuple(_real(base) if isinstance(base, _StandIn) else base for base in bases)
            return type(real[0])(name, real, names)
        return super().__new__(cls, name, bases, names)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _real(cls)(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        return getattr(_real(cls), name)

    @property
    def __signature__(cls) -> inspect.Signature:
        return inspect.signature(_real(cls))

    def __instancecheck__(cls, instance: Any) -> bool:
        real = cls._if_imported()
        return real is not None and isinstance(instance, real)

    def __subclasscheck__(cls, subclass: type) -> bool:
        real = cls._if_imported()
        return subclass is cls or (real is not None and issubclass(subclass, real))

    def _if_imported(cls) -> Any:
        """Nothing is an instance of what nobody has imported."""
        return getattr(sys.modules.get(cls.__module__), cls.__name__, None)

    def __repr__(cls) -> str:
        return f"<{cls.__module__}.{cls.__name__}, imported when used>"


def _real(stand_in: Any) -> Any:
    return _thing(stand_in.__module__, stand_in.__name__)


def _thing(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _pickled(stand_in: Any) -> tuple[Callable[[str, str], Any], tuple[str, str]]:
    """Who reads the bytes gets the thing itself."""
    return _thing, (stand_in.__module__, stand_in.__name__)


copyreg.pickle(_StandIn, _pickled)


@contextmanager
def _deferred_decorators() -> Iterator[None]:
    """Let the decorators by which modules speak to torch's compiler wait until somebody imports it."""
    torch, compiler = sys.modules.get("torch"), sys.modules.get("torch.compiler")
    later = getattr(sys.modules.get("torch._compile"), "_disable_dynamo", None)
    names = ("disable", "allow_in_graph")
    real: dict[str, Any] = {name: getattr(compiler, name, None) for name in names}
    if torch is None or later is None or None in real.values() or _DYNAMO in sys.modules:
        yield
        return

    def disable(fn: Any = None, recursive: bool = True, **others: Any) -> Any:
        if fn is None:
            return functools.partial(disable, recursive=recursive, **others)
        decorate = functools.partial(real["disable"], fn, recursive, **others)
        if not _may_wait(fn):
            return decorate()
        stand_in = later(fn, recursive)  # torch's own way to do this before its compiler is there
        WATCH.when_imported(_DYNAMO, lambda module: _redecorate(fn, stand_in, decorate))
        return stand_in

    def allow_in_graph(fn: Any) -> Any:
        return _mark_later(fn, "allow_in_graph")

    vars(compiler).update(disable=disable, allow_in_graph=allow_in_graph)
    stand_in = _Compiler()
    vars(torch).setdefault("_dynamo", stand_in)
    try:
        yield
    finally:
        vars(compiler).update(real)
        if vars(torch).get("_dynamo") is stand_in:
            del vars(torch)["_dynamo"]


class _Compiler:
    """What ``torch._dynamo`` is meanwhile, unless somebody imports it."""

    def __getattr__(self, name: str) -> Any:
        if name in ("allow_in_graph", "assume_constant_result"):
            return functools.partial(_mark_later, name=name)
        return getattr(importlib.import_module(_DYNAMO), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(importlib.import_module(_DYNAMO), name, value)


def _mark_later(fn: Any, name: str) -> Any:
    """Let the compiler take note of a function, which it returns as it is, when it is imported."""

    def mark() -> Any:
        return getattr(importlib.import_module(_DYNAMO), name)(fn)

    if not _may_wait(fn):
        return mark()
    WATCH.when_imported(_DYNAMO, lambda module: _redecorate(fn, fn, mark))
    return fn


def _may_wait(fn: Any) -> bool:
    return inspect.isfunction(fn) and fn.__module__.startswith(_FOR) and _DYNAMO not in sys.modules


def _redecorate(fn: Any, now: Any, decorate: Callable[[], Any]) -> None:
    """Put a function's real decoration where its class, or modules, have what stands for it now."""
    decorated = decorate()
    if decorated is now:
        return
    _put_in_modules(lambda value: decorated if value is now else value)
    *outer, name = fn.__qualname__.split(".")
    holder: Any = sys.modules.get(fn.__module__)
    for each in outer:
        holder = getattr(holder, each, None)
    if holder is not None and vars(holder).get(name) is now:
        setattr(holder, name, decorated)
