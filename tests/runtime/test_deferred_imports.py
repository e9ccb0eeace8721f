"""What is deferred behaves as if it had been imported, and nothing of it stays behind when it is."""

import builtins
import importlib
import inspect
import json
import pickle
import subprocess
import sys
import threading
import typing

import pytest

from gangline.runtime import deferred_imports as deferred
from gangline.runtime.deferred_imports import deferred_imports

HEAVY = """
class Thing:
    def __init__(self, size=1): self.size = size
    @classmethod
    def make(cls, size): return cls(size)
class Oops(ValueError): pass
class Context:
    entered = 0
    def __enter__(self): type(self).entered += 1
    def __exit__(self, *error): pass
def func(a, b=2): return a + b
OTHER = 5
"""
USER = """
from heavy.sub import Thing, func as add, Oops, Context
def is_thing(x): return isinstance(x, Thing)
def is_either(x): return isinstance(x, (int, Thing)), isinstance(x, Thing | None)
def make(size): return Thing(size)
def make_by_class(size): return Thing.make(size)
def with_context():
    with Context(): pass
def catch(error):
    try: raise error
    except Oops: return "oops"
    except KeyError: return "key"
def derive():
    class More(Thing): pass
    return More(7)
"""

PACKAGES = ("heavy", "user", "somebody")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """``heavy.sub``, which is deferred for ``user``; both not imported yet."""
    for package, files in {
        "heavy": {"__init__": "", "sub": HEAVY},
        "user": {"__init__": "", "a": USER, "star": "from .a import *\n", "heavy": HEAVY},
        "somebody": {"__init__": "", "else_": USER},
    }.items():
        (tmp_path / package).mkdir()
        for name, text in files.items():
            (tmp_path / package / f"{name}.py").write_text(text)
    names = {"Thing", "func", "Oops", "Context"}
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(deferred, "_FOR", ("user.",))
    monkeypatch.setattr(deferred, "_NAMES", dict.fromkeys(("heavy.sub", "user.heavy", "nowhere.sub"), names))
    before = builtins.__import__
    yield tmp_path
    assert builtins.__import__ is before
    for name in list(sys.modules):
        if name.split(".")[0] in PACKAGES:
            del sys.modules[name]
    for name in ("heavy.sub", "user.heavy"):
        deferred._MADE.pop(name, None)
        for call in list(deferred.WATCH._waiting.get(name, ())):
            deferred.WATCH.forget(name, call)


def user(name="user.a"):
    with deferred_imports():
        return importlib.import_module(name)


def stand_ins():
    return {
        f"{name}.{key}"
        for name, module in sys.modules.items()
        if name.split(".")[0] in PACKAGES
        for key, value in vars(module).items()
        if type(value) is deferred._StandIn
    }


USES = {
    "call": lambda a: a.make(3).size == 3,
    "attribute": lambda a: a.make_by_class(4).size == 4,
    "alias": lambda a: a.add(1) == 3,
    "context": lambda a: a.with_context() is None and sys.modules["heavy.sub"].Context.entered == 1,
    "base": lambda a: a.derive().size == 7 and a.derive().__class__.__mro__[1] is a.Thing,
    "pickle": lambda a: pickle.loads(pickle.dumps(a.Thing)) is sys.modules["heavy.sub"].Thing,
    "signature": lambda a: list(inspect.signature(a.add).parameters) == ["a", "b"],
    "import": lambda a: importlib.import_module("heavy.sub").Thing is a.Thing,
}


@pytest.mark.parametrize("use", USES)
def test_the_first_use_imports_and_every_stand_in_makes_way(packages, use):
    a, star = user(), user("user.star")
    assert "heavy.sub" not in sys.modules
    assert stand_ins() == {
        f"user.{m}.{key}" for m in ("a", "star") for key in ("Thing", "add", "Oops", "Context")
    }
    assert USES[use](a)
    heavy = sys.modules["heavy.sub"]
    assert not stand_ins()
    assert a.Thing is star.Thing is heavy.Thing and a.add is star.add is heavy.func
    assert USES[use](a) or use == "context"


def test_questions_import_nothing(packages):
    a = user()
    assert not a.is_thing(3) and a.is_either(3) == (True, False) and a.is_either(None) == (False, True)
    assert a.catch(KeyError()) == "key"
    assert not issubclass(int, a.Thing) and issubclass(a.Thing, a.Thing)
    assert typing.get_args(a.Thing | None) == (a.Thing, type(None))
    assert "heavy.sub" in repr(a.Thing) and a.add.__name__ == "func"
    with pytest.raises(ZeroDivisionError):
        a.catch(ZeroDivisionError())
    assert "heavy.sub" not in sys.modules
    kept = a.Thing
    thing = importlib.import_module("heavy.sub").Thing(2)
    assert isinstance(thing, kept) and issubclass(type(thing), kept) and a.is_thing(thing)
    assert a.is_either(thing) == (True, True)
    assert a.catch(sys.modules["heavy.sub"].Oops()) == "oops"


def test_an_annotation_or_a_default_that_keeps_it_can_use_it(packages):
    kept = user().Thing
    importlib.import_module("heavy.sub")
    assert kept(9).size == 9 and type(kept(1)) is sys.modules["heavy.sub"].Thing


def test_others_get_the_real_thing(packages):
    user()
    other = user("somebody.else_")
    assert "heavy.sub" in sys.modules and not stand_ins()
    assert other.Thing is sys.modules["heavy.sub"].Thing


@pytest.mark.parametrize("why", ["another name", "a star", "imported", "not deferring", "compiled"])
def test_anything_else_is_imported(packages, monkeypatch, why):
    text = {"another name": "from heavy.sub import Thing, OTHER\n", "a star": "from heavy.sub import *\n"}
    (packages / "user" / "a.py").write_text(text.get(why, "from heavy.sub import Thing\n"))
    if why == "imported":
        importlib.import_module("heavy.sub")
    if why == "compiled":
        monkeypatch.setattr(deferred, "_source", lambda name: None)
    a = importlib.import_module("user.a") if why == "not deferring" else user()
    assert not stand_ins() and a.Thing is sys.modules["heavy.sub"].Thing


@pytest.mark.parametrize("missing", ["name", "module"])
def test_what_is_not_there_fails_as_ever(packages, missing):
    (packages / "heavy" / "sub.py").write_text("class Another: pass\n")
    where = "heavy.sub" if missing == "name" else "nowhere.sub"
    (packages / "user" / "a.py").write_text(
        f"try:\n    from {where} import Thing\nexcept ImportError:\n    Thing = None\n"
    )
    assert user().Thing is None


def test_a_relative_import(packages):
    (packages / "user" / "a.py").write_text("from .heavy import Thing\nfrom . import heavy\n")
    a = user()
    assert a.Thing is a.heavy.Thing and not stand_ins()
    del sys.modules["user.a"], sys.modules["user.heavy"]
    (packages / "user" / "a.py").write_text("from .heavy import Thing\n# another\n")
    importlib.invalidate_caches()
    a = user()
    assert "user.heavy" not in sys.modules and a.Thing(6).size == 6
    assert a.Thing is sys.modules["user.heavy"].Thing


def test_a_module_that_fails_fails_when_it_is_used(packages):
    (packages / "heavy" / "sub.py").write_text(
        "class Thing: pass\nclass Oops: pass\nContext = func = None\n1 // 0\n"
    )
    a = user()
    assert not a.is_thing(1)
    with pytest.raises(ZeroDivisionError):
        a.make(1)
    (packages / "heavy" / "sub.py").write_text(HEAVY + "# mended\n")
    importlib.invalidate_caches()
    assert a.make(5).size == 5 and not stand_ins()


def test_contexts_that_overlap_leave_import_as_it_was(packages):
    before = builtins.__import__
    inside, leave = threading.Event(), threading.Event()

    def other():
        with deferred_imports():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with deferred_imports():
        thread.start()
        inside.wait()
    assert builtins.__import__ is not before
    leave.set()
    thread.join()
    assert builtins.__import__ is before


def test_somebody_who_wraps_import_meanwhile(packages, monkeypatch):
    before = builtins.__import__
    calls = []
    with deferred_imports():
        ours = builtins.__import__

        def wrapped(*args, **kwargs):
            calls.append(args[0])
            return ours(*args, **kwargs)

        builtins.__import__ = wrapped
    try:
        assert builtins.__import__ is wrapped
        a = user()
        assert "heavy.sub" in calls and a.make(2).size == 2
    finally:
        builtins.__import__ = ours
    with deferred_imports():
        assert builtins.__import__ is ours
    assert builtins.__import__ is before


PLAIN = """
import torch, torch._dynamo
import transformers, transformers.modeling_utils, transformers.generation, transformers.masking_utils
transformers.generation.GenerationMixin
"""
QUICK = """
import sys
from gangline.runtime.libraries import import_quickly
import_quickly()
import torch, transformers, transformers.masking_utils
assert "sympy" not in sys.modules and "torch._dynamo" not in sys.modules and "accelerate" not in sys.modules
assert "_dynamo" not in vars(torch)
"""
REPORT = """
import builtins, json, sys, types
from transformers.masking_utils import padding_mask_function, sdpa_mask
seen = torch.tensor([[False, True, True, True], [True, True, True, False]])
mask = sdpa_mask(
    batch_size=2, q_length=4, kv_length=4, mask_function=padding_mask_function(seen), use_vmap=True,
    allow_is_causal_skip=False,
)
compiled = torch.compile(lambda x: x + 1, backend="eager", fullgraph=True)(torch.ones(2))

import torch._dynamo, torch._dynamo.trace_rules as rules
import torch.distributed._composable.fsdp, torch.distributed.checkpoint.hf_storage
import torch.fx.experimental.symbolic_shapes
import accelerate.hooks, accelerate.utils.modeling
marks = {}
allowed = []
odd = []
for name, module in sorted(sys.modules.items()):
    if not name.startswith(("transformers.", "torch.distributed.tensor")) or module is None:
        continue
    holders = [(name, module)]
    holders += [
        (f"{name}.{key}", value) for key, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == name
    ]
    for place, holder in holders:
        for key, value in list(vars(holder).items()):
            value = value.fget if isinstance(value, property) else value
            if type(value).__name__ == "_StandIn":
                odd.append(f"{place}.{key}")
            if not isinstance(value, types.FunctionType):
                continue
            if id(value) in rules._allowed_callable_ids.function_ids:
                allowed.append(f"{place}.{key}")
            found = {
                each: str(mark) for each, mark in vars(value).items()
                if "dynamo" in each and "callable" not in each and not each.endswith("_id")
            }
            if found:
                marks[f"{place}.{key}"] = found
print(json.dumps({
    "mask": mask.tolist(),
    "compiled": compiled.tolist(),
    "marks": marks,
    "allowed": sorted(allowed),
    "odd": odd,
    "dynamo": torch._dynamo is sys.modules["torch._dynamo"] and hasattr(torch._dynamo, "reset"),
    "import": builtins.__import__.__module__,
    "finders": [type(finder).__name__ for finder in sys.meta_path if type(finder).__name__ == "Watch"],
    "decorators": [torch.compiler.disable.__module__, torch.compiler.allow_in_graph.__module__],
}))
"""


@pytest.mark.slow
def test_all_is_as_without_when_the_compiler_and_the_rest_are_used():
    plain, quick = (
        json.loads(
            subprocess.run(
                [sys.executable, "-c", code + REPORT], capture_output=True, text=True, check=True
            ).stdout
        )
        for code in (PLAIN, QUICK)
    )
    assert quick == plain
    assert quick["mask"][0][0][0] == [False, True, True, True] and quick["compiled"] == [2.0, 2.0]
    assert quick["dynamo"] and not quick["odd"] and not quick["finders"]
    assert len(quick["marks"]) > 1 and quick["allowed"]
