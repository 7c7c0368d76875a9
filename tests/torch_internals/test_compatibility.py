"""One test for each piece of hookattn.torch_internals: what it takes for granted of torch still holds.

Red here, and torch has changed; what fails elsewhere then mostly follows from that.
"""

from __future__ import annotations

import importlib
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import hookattn
from hookattn.torch_internals import (
    code_patching,
    compilation,
    dispatch_modes,
    fake_tensors,
    frames,
    function_modes,
    isolation,
    module_state,
    operators,
    private,
    process_group,
    scripted,
    tensor_identity,
    transforms,
)
from hookattn.torch_internals.flat_parameters import flattened

NAMES = {  # the piece of each private name, as its module looks it up
    function_modes: ("depth", "_at", "_push", "_pop"),
    isolation: ("set_grad_enabled", "_autocast_enabled", "_DisableTorchFunction", "_graph_task"),
    compilation: ("_set_callback", "_callback"),
    dispatch_modes: (
        "TorchDispatchMode",
        "tree_leaves",
        "_count",
        "_push",
        "_pop",
        "_below_autograd",
        "_dispatch_key",
    ),
    fake_tensors: ("FakeTensor", "FakeTensorMode", *(f"IMPOSSIBLE[{i}]" for i in range(4))),
    operators: ("_OVERLOAD", "_PACKET", "_HIGHER_ORDER"),
    transforms: ("_is_batched", "_is_functional", "is_wrapped", "_level", "_examples_dim", "_inner", "outside"),
    module_state: ("children_of", "parameters_of", "buffers_of", "pre_hooks_of"),
}


class Log(TorchFunctionMode):
    """Writes down which functions it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_processes_of_a_group_share_a_store(tmp_path: Path) -> None:
    assert process_group.world() is None and process_group.first_to_claim("x", 0) is None  # there is no group
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        assert process_group.world() is None  # of one process alone
        assert [process_group.first_to_claim("x", rank) for rank in (3, 1, 3)] == [3, 3, 3]
        assert process_group.first_to_claim("y", 1) == 1
    finally:
        torch.distributed.destroy_process_group()


def test_every_private_name_is_there() -> None:
    absent = [
        f"{module.__name__}.{name}"
        for module, names in NAMES.items()
        for name in names
        if isinstance(eval(name, vars(module)), private._Missing)
    ]
    assert not absent, f"torch {torch.__version__} lacks what these look up: {absent}"
    assert frames._CALL is not None, "nn.Module._call_impl is gone, or has other locals"


# ------------------------------------------------------------------------------------------------ function modes


def test_the_stack_of_function_modes_is_what_with_opens() -> None:
    outer, inner = Log(), Log()
    assert function_modes.depth() == 0
    with outer, inner:
        assert function_modes.depth() == 2 and function_modes.open_modes() == [outer, inner]
    stack = function_modes.ModeStack(Log)
    stack.push()
    try:
        torch.zeros(2).exp()
        assert stack.on_top() and stack.mode.seen.count("exp") == 1  # type: ignore[attr-defined]
        with outer, stack.aside():
            assert function_modes.open_modes() == [outer]
            torch.zeros(2).sin()
        assert "sin" in outer.seen and "sin" not in stack.mode.seen  # type: ignore[attr-defined]
    finally:
        stack.close()
    assert function_modes.depth() == 0


def test_function_modes_are_of_one_thread() -> None:
    depths: list[int] = []
    with Log():
        thread = threading.Thread(target=lambda: depths.append(function_modes.depth()))
        thread.start()
        thread.join()
    assert depths == [0]


def test_a_mode_beneath_others_gets_what_they_hand_on() -> None:
    above, below = Log(), Log()
    with above, function_modes.beneath(below):
        torch.zeros(2).exp()
    assert "exp" in above.seen and "exp" in below.seen and function_modes.depth() == 0


# ------------------------------------------------------------------------------------------------ isolation


def test_isolated_is_without_gradients_autocast_and_modes() -> None:
    x, log = torch.randn(3, 3, requires_grad=True), Log()
    with log, torch.autocast("cpu", dtype=torch.bfloat16):
        log.seen.clear()
        with isolation.isolated(x):
            y = x @ x
            assert not torch.is_grad_enabled()
        seen, log.seen = log.seen, []
        assert torch.is_grad_enabled() and y.dtype == torch.float32 and not y.requires_grad
        assert seen == []
        assert (x @ x).dtype == torch.bfloat16 and "matmul" in "".join(log.seen), "all of it is back"


def test_what_is_isolated_already() -> None:
    x = torch.randn(3, 3)
    assert not isolation.is_isolated(x)  # with gradients
    with torch.no_grad():
        assert isolation.is_isolated(x) and not isolation.is_isolated(nn.Parameter(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not isolation.is_isolated(x)
        with Log():
            assert not isolation.is_isolated(x)
        with isolation.isolated(x):
            assert isolation.is_isolated(x)
    with torch.inference_mode():
        assert isolation.is_isolated(x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_pass_is_known_as_one(reentrant: bool) -> None:
    seen: list[bool] = []

    def part(x: Tensor) -> Tensor:
        seen.append(isolation.in_backward())
        return x.exp()

    checkpoint(part, torch.zeros(2, requires_grad=True), use_reentrant=reentrant).sum().backward()
    assert seen == [False, True]


def test_a_composable_checkpoint_says_when_its_module_runs_and_when_it_has_run() -> None:
    """Its module is handed to the generator, is run by itself between two steps of it, and by the generator after."""
    from torch.distributed._composable import checkpoint as composable

    generator = vars(torch.utils.checkpoint)["_checkpoint_without_reentrant_generator"]
    assert generator is vars(sys.modules["torch.distributed._composable.checkpoint_activation"])[generator.__name__]
    seen: list[bool] = []

    class Part(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(isolation.in_backward())
            return x.exp()

    composable(Part())(torch.zeros(2, requires_grad=True)).sum().backward()
    assert seen == [False, True]


def test_flat_parameters_know_what_they_are_made_of(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2, bias=False))
        names = [(3, 5), (5,), (5, 2)]
        wrapper = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        assert [shape for _, shape in flattened(wrapper)] == [names[0][::-1], names[1], names[2][::-1]]
        assert not list(flattened(model))
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------ code


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "kernels_of_somebody.py").write_text(
        "def attend(q, *, scale=2):\n    return q * scale\n"
        "def closed():\n    one = 1\n    def inner(q):\n        return q + one\n    return inner\n"
        "inner = closed()\n"
    )
    yield importlib.import_module("kernels_of_somebody")
    sys.modules.pop("kernels_of_somebody", None)


@pytest.mark.parametrize(("name", "before"), [("attend", 6), ("inner", 4)])
def test_exchanged_code_is_seen_by_who_imported_the_function_before(
    module: types.ModuleType, name: str, before: int
) -> None:
    imported: Callable[..., int] = getattr(module, name)  # as `from kernels_of_somebody import attend` has it

    def body(original: Callable[..., int], *args: Any, **kwargs: Any) -> int:
        return -original(*args, **kwargs)

    code_patching.install([code_patching.Patch(module, name, body)], "test")
    try:
        assert imported(3) == -before and getattr(module, name) is imported
        assert compilation.evaluator() is sys.modules.get("torch._dynamo.eval_frame")
    finally:
        code_patching.remove("test")
    assert imported(3) == before and not code_patching.exchanged()


def test_a_copy_of_a_function_sees_other_globals() -> None:
    scope = {"answer": lambda: "no"}
    exec("def ask(x, *, y='!'):\n    return answer() + x + y", scope)
    function: Any = scope["ask"]
    assert code_patching.copy_of(function, answer=lambda: "yes")("?") == "yes?!" and function("?") == "no?!"
    # torch's own Python form of multi-head attention asks by this name whether somebody wants to see it.
    body = F.multi_head_attention_forward
    assert isinstance(body, types.FunctionType) and "has_torch_function" in frames.names_used(body)


def test_a_compiled_function_is_compiled_where_torch_asks_for_the_callback() -> None:
    compiled: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(1)
        return graph.forward

    function = torch.compile(lambda x: x.exp() + 1, backend=backend)
    evaluator = compilation.evaluator()
    assert evaluator is not None
    patch = code_patching.Patch(evaluator, compilation.STANCE, lambda original, callback: original(callback) and None)
    code_patching.install([patch], "test")
    try:
        function(torch.zeros(2))
        assert compiled == [], "asked before it compiles"
    finally:
        code_patching.remove("test")
    function(torch.zeros(2))
    assert compiled == [1]
    before = compilation.callback()
    with compilation.compiling_by(False):  # run what is compiled, compile nothing
        assert compilation.callback() is False
        with compilation.compiling_by(None):
            assert compilation.callback() is None
    assert compilation.callback() is before
    torch.compiler.reset()


def test_a_function_that_has_to_be_compiled_complains_only_where_frames_are_counted() -> None:
    def nothing(original: Any, callback: Any) -> None:
        original(callback)
        if counted.pop():
            compilation.count_no_frames()

    function = torch.compile(lambda x: x.exp() + 1, backend="eager", fullgraph=True)
    evaluator, counted = compilation.evaluator(), [False, True]
    assert evaluator is not None
    code_patching.install([code_patching.Patch(evaluator, compilation.STANCE, nothing)], "test")
    try:
        assert function(torch.zeros(1)).item() == 2
        if hasattr(evaluator, compilation.COUNT):
            with pytest.raises(RuntimeError, match="no compiled frames"):
                function(torch.zeros(1))
    finally:
        code_patching.remove("test")
        torch.compiler.reset()


def test_operators_have_a_library_and_a_name() -> None:
    for add in (torch.ops.aten.add.Tensor, torch.ops.aten.add):
        assert operators.operator_name(add) == ("aten", "add")
    assert operators.operator_name(torch.ops.higher_order.cond) == ("higher_order", "cond")
    assert operators.operator_name(torch.add) is None
    assert operators.argument_defaults("native_dropout") == {"input": None, "p": None, "train": None}


def test_what_a_mapped_tensor_stands_for() -> None:
    seen: list[Any] = []

    def one(x: Tensor, y: Tensor) -> Tensor:
        assert transforms.stands_for_others(x)
        with transforms.outside():
            seen.append(transforms.examples({"x": x, "y": y}))
        return (x * y).sum()

    x, y = torch.rand(3, 4, 2), torch.rand(2)
    torch.vmap(torch.vmap(torch.func.grad(one), (0, None)), (2, 0))(x, y)
    ((found, counts),) = seen
    assert counts == (2, 3) and not transforms.stands_for_others(found["x"])
    assert torch.equal(found["x"], x.permute(2, 0, 1)) and torch.equal(found["y"], y[:, None])
    assert not transforms.stands_for_others(x)


def test_a_scripted_function_is_called_by_its_class() -> None:
    @torch.jit.script
    def double(x: Tensor) -> Tensor:
        return x * 2

    kind = torch.jit.ScriptFunction
    assert type(double) is kind and "__call__" in vars(kind)
    code_patching.install(
        [code_patching.Patch(kind, "__call__", lambda original, function, x: -original(function, x))],
        "test",
    )
    try:
        assert double(torch.ones(1)).item() == -2
    finally:
        code_patching.remove("test")
    assert double(torch.ones(1)).item() == 2
    assert scripted.made_from(double)(torch.ones(1)).item() == 2  # type: ignore[misc]
    method = torch.jit.script(nn.Linear(1, 1)).forward
    assert type(method) is torch.ScriptMethod and scripted.made_from(method) is None and method.inlined_graph


# ------------------------------------------------------------------------------------------------ frames


class Asks(nn.Module):
    """Says where it is, in the middle of its forward."""

    def __init__(self, say: Callable[[], object]):
        super().__init__()
        self.say = say

    def forward(self, x: Tensor, *, twice: bool = False) -> object:
        return self.say()


@pytest.mark.parametrize("hooked", [False, True])
def test_the_module_that_runs_is_found_in_the_frames(hooked: bool) -> None:
    inner = Asks(lambda: (frames.running_path(paths), frames.call_arguments(inner)))
    model = nn.Sequential(nn.Sequential(inner))
    paths = {id(m): path for path, m in model.named_modules()}
    if hooked:  # then torch takes another way from __call__ to forward
        inner.register_forward_pre_hook(lambda *_: None)
        inner.register_forward_hook(lambda *_: None)
    x = torch.zeros(1)
    assert model(x) == ("0.0", ((x,), {}))
    assert inner(x, twice=True) == ("0.0", ((x,), {"twice": True}))
    assert inner.forward(x) == ("0.0", None), "nobody called it"
    assert frames.running_path(paths) is None


# ------------------------------------------------------------------------------------------------ tensors and modules


def test_fake_tensors_have_a_device_and_no_values() -> None:
    mode = fake_tensors.FakeTensorMode(allow_non_fake_inputs=True)
    operators: list[Any] = []

    class Rules(dispatch_modes.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operators.append(func)
            return func(*args, **(kwargs or {}))

    with mode:
        x = torch.empty_strided((2, 3), (3, 1), device="cuda")
    assert isinstance(x, fake_tensors.FakeTensor) and x.device.type == "cuda"
    y = torch.empty(2, 3).copy_(torch.ones(2, 3))
    with mode:
        fake = torch.empty(2, 3)
    assert isinstance(fake + y, fake_tensors.FakeTensor), "beside real ones"
    for reads in (lambda: fake.sum().item(), lambda: torch.equal(fake, fake + 1)):
        with Rules(), pytest.raises(fake_tensors.IMPOSSIBLE):
            reads()
        assert fake_tensors.reads_a_value(operators[-1])
    assert tensor_identity.storage_of(fake) not in (0, tensor_identity.storage_of(fake + 1))
    assert fake_tensors.is_grouped_mm(torch.ops.aten._grouped_mm.default)
    assert not fake_tensors.is_grouped_mm(torch.ops.aten.mm.default)


def test_dispatch_modes_see_operators_and_leaves_are_walked() -> None:
    operators: list[str] = []

    class See(dispatch_modes.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operators.append(str(func))
            return func(*args, **(kwargs or {}))

    with See():
        F.linear(torch.ones(2, 3), torch.ones(4, 3))
    assert any("mm" in name for name in operators)
    assert dispatch_modes.tree_leaves({"a": [1, (2, 3)]}) == [1, 2, 3]


def test_a_write_is_counted_and_views_have_one_memory() -> None:
    x = torch.zeros(4)
    before = tensor_identity.version_of(x)
    x[1:].add_(1)
    assert tensor_identity.version_of(x) == before + 1
    assert tensor_identity.storage_of(x) == tensor_identity.storage_of(x[1:]) != tensor_identity.storage_of(x.clone())
    meta = torch.empty(3, device="meta")
    assert tensor_identity.storage_of(meta) == tensor_identity.storage_of(meta[1:]) != 0
    with torch.inference_mode():
        assert tensor_identity.version_of(torch.zeros(1)) == -1


def test_a_module_keeps_what_it_holds_in_dictionaries() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2))
    model[1].register_module("empty", None)
    assert list(module_state.children_of(model)) == ["0", "1"]
    assert module_state.children_of(model[1]) == {"empty": None}
    assert list(module_state.parameters_of(model[0])) == ["weight", "bias"]
    assert "running_mean" in module_state.buffers_of(model[1])
    ran: list[str] = []
    module_state.pre_hooks_of(model)["any key"] = lambda *_: ran.append("hook")
    model(torch.zeros(2, 2))
    assert ran == ["hook"] and module_state.pre_hooks_of(model) is module_state.hooks_of(model)["_forward_pre_hooks"]
    handles = [
        model.register_forward_hook(lambda *_: None, with_kwargs=True, always_call=True),
        model.register_full_backward_hook(lambda *_: None),
        nn.modules.module.register_module_forward_pre_hook(lambda *_: None),
    ]
    try:
        assert sum(map(len, module_state.hooks_of(model).values())) == 3
        assert sum(map(len, module_state.hook_flags_of(model).values())) == 2
        assert sum(map(len, module_state.global_hooks().values())) == 1
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------------------------ what is missing


@pytest.mark.parametrize(
    "use",
    [
        lambda gone: gone(1),
        lambda gone: isinstance(1, gone),
        lambda gone: issubclass(int, gone),
        lambda gone: gone.something,
        lambda gone: type("Sub", (gone,), {})(),
    ],
    ids=["call", "isinstance", "issubclass", "attribute", "subclass"],
)
@pytest.mark.parametrize("where", [("torch._C", "_gone_tomorrow"), ("torch._gone_module", "name")])
def test_a_name_that_torch_lacks_is_said_when_it_is_used(where: tuple[str, str], use: Callable[[Any], Any]) -> None:
    gone = private.private(*where, "function modes")  # no error yet
    with pytest.raises(hookattn.HookattnError) as caught:
        use(gone)
    said = str(caught.value)
    assert "hookattn's function modes" in said and ".".join(where) in said and f"torch {torch.__version__}" in said


def test_what_torch_lacks_is_said_in_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the public way: a model that needs the piece, and one that needs it not."""
    monkeypatch.setattr(
        function_modes, "_push", private.missing("torch._C._push_on_torch_function_stack", "function modes")
    )

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    with pytest.raises(hookattn.HookattnError, match=r"hookattn's function modes need torch\._C\._push"):
        hookattn.trace(Model(), torch.randn(1, 2, 3, 4))
    monkeypatch.undo()
    assert len(hookattn.trace(Model(), torch.randn(1, 2, 3, 4)).calls) == 1, "nothing is left of the one before"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p.setattr(frames, "_CALL", None), "torch.nn.Module._call_impl"),
        (lambda p: p.setattr(compilation, "STANCE", "_gone"), "torch._dynamo.eval_frame._gone"),
    ],
    ids=["frames", "compilation"],
)
def test_other_ways_than_by_name_are_missed_as_clearly(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None], said: str
) -> None:
    importlib.import_module("torch._dynamo.eval_frame")
    change(monkeypatch)
    with pytest.raises(hookattn.HookattnError, match=said):
        compilation.evaluator()
        frames.call_arguments(nn.Linear(1, 1))
