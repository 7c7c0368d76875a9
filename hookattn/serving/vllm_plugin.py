"""The plug-in of vLLM (entry point ``vllm.general_plugins``): one trace for each request that asks for it.

vLLM calls :func:`register` in each of its processes. It does nothing unless ``HOOKATTN_VLLM`` names a folder. Then what
a worker runs is put into :class:`~hookattn.serving.tracer.RequestTracer`: each step in which a recorded request takes
part is traced, and nothing is done in the others. docs/serving.md says how to use it.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from ..attention.kernel_call import KernelCall
from ..calls.shard import Shard
from .request_file import write_error
from .settings import FOLDER, Settings, from_environment
from .tracer import RequestTracer

_LOG = logging.getLogger("vllm.hookattn")  # below vLLM's own, so that it is seen where vLLM's messages are
_ASKS = "hookattn"
_CAPTURED = (
    "vLLM captures whole steps of this model in CUDA graphs (cudagraph_mode={}), in which no attention can be seen; "
    "start it with enforce_eager=True (vllm serve --enforce-eager), or with cudagraph_mode=PIECEWISE or NONE"
)
# Of vLLM 0.11 and later: eight digits that it appends to the name that a client gives.
_DIGITS = 8

_tracers: weakref.WeakSet[RequestTracer] = weakref.WeakSet()


def register() -> None:
    """Record the requests of this process that ask for it, if the environment says so.

    Raises:
        InputError, SelectionError: the environment says something that is no setting; names it.
    """
    settings = from_environment(os.environ)
    if settings is None:
        return
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    if hasattr(WorkerWrapperBase, "_hookattn"):
        return
    WorkerWrapperBase._hookattn = settings
    for name, around in (("init_device", _begin), ("execute_model", _step), ("shutdown", _end)):
        own = getattr(WorkerWrapperBase, name)
        setattr(WorkerWrapperBase, name, _around(own, around))


def _around(own: Callable[..., Any], around: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def method(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
        return around(wrapper, own, *args, **kwargs)

    return method


def _begin(wrapper: Any, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``init_device``: the worker is there, and what it is told to do is settled."""
    made = own(wrapper, *args, **kwargs)
    settings: Settings = type(wrapper)._hookattn
    rank = wrapper.worker.rank
    refused = _captures(wrapper.vllm_config)
    tracer = RequestTracer(settings, rank, _LOG, _shard_of(wrapper.vllm_config, rank), refused)
    wrapper._hookattn_tracer = tracer
    _tracers.add(tracer)
    atexit.register(_close, weakref.ref(tracer))
    if refused:
        _LOG.error("hookattn: no request will be recorded: %s", refused)
        write_error(settings.folder / f"{FOLDER.lower()}.rank{rank}.error.json", rank=rank, error=refused)
    else:
        _LOG.info("hookattn: requests that ask for it are recorded into %s", settings.folder)
    _listen_in_process()
    return made


def _step(wrapper: Any, own: Callable[..., Any], scheduled: Any, *args: Any, **kwargs: Any) -> Any:
    """``execute_model``: one step of the engine."""
    tracer: RequestTracer = wrapper._hookattn_tracer
    tracer.finished(scheduled.finished_req_ids)
    for new in scheduled.scheduled_new_reqs:
        _ask(tracer, new, wrapper)
    if not len(tracer):
        tracer.step += 1
        return own(wrapper, scheduled, *args, **kwargs)
    runner = wrapper.worker.model_runner
    with tracer.running(runner.model, scheduled.num_scheduled_tokens, _names(runner)):
        return own(wrapper, scheduled, *args, **kwargs)


def _end(wrapper: Any, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``shutdown``."""
    tracer = vars(wrapper).get("_hookattn_tracer")
    if tracer is not None:
        tracer.close()
    return own(wrapper, *args, **kwargs)


def _close(tracer: weakref.ref[RequestTracer]) -> None:
    found = tracer()
    if found is not None:
        found.close()


def _ask(tracer: RequestTracer, new: Any, wrapper: Any) -> None:
    """A request that runs for the first time, or again after it was preempted."""
    params = new.sampling_params if new.sampling_params is not None else new.pooling_params
    extra = getattr(params, "extra_args", None) or {}
    notes = []
    if new.num_computed_tokens:
        notes.append(
            f"its first {new.num_computed_tokens} positions were computed before it ran, for another request (a prefix "
            "cache): their keys are here, their queries are not"
        )
    tracer.begin(
        new.req_id, _as_client_knows_it(new.req_id), extra.get(_ASKS), wrapper.worker.model_runner.model, *notes
    )


def _as_client_knows_it(name: str) -> str:
    """The name of a request without the digits that vLLM appends to it."""
    if os.environ.get("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "0") not in ("", "0"):
        return name
    shown, dash, digits = name.rpartition("-")
    appended = dash and len(digits) == _DIGITS and all(c in "0123456789abcdef" for c in digits)
    return shown if appended else name


def _names(runner: Any) -> Callable[[], Sequence[str]]:
    """What gives the requests of the batch that a runner runs with, which it puts in order as it begins a step."""
    if hasattr(runner, "input_batch"):
        return lambda: runner.input_batch.req_ids
    if not hasattr(runner, "_hookattn_names"):
        prepare = runner.prepare_inputs

        @functools.wraps(prepare)
        def prepared(*args: Any, **kwargs: Any) -> Any:
            made = prepare(*args, **kwargs)
            runner._hookattn_names = made.req_ids
            return made

        runner.prepare_inputs, runner._hookattn_names = prepared, ()
    return lambda: runner._hookattn_names


def _captures(config: Any) -> str:
    """Why the attention of a model cannot be seen; empty: it can, though the rest of it may be compiled."""
    if config.model_config is not None and config.model_config.enforce_eager:
        return ""
    graphs = getattr(getattr(config.compilation_config, "cudagraph_mode", None), "name", "NONE")
    return _CAPTURED.format(graphs) if "FULL" in graphs else ""


def _shard_of(config: Any, rank: int) -> Callable[[KernelCall], Shard | None]:
    """Which heads of the model a call of this process has: vLLM gives each rank as many, one behind the other."""
    count = config.parallel_config.tensor_parallel_size
    index = rank % count
    groups_of = config.model_config.get_total_num_kv_heads()

    def shard(call: KernelCall) -> Shard | None:
        if count == 1:
            return None
        heads, groups = call.shape[1], call.v.shape[1]
        start = None
        if groups * count == groups_of:
            start = index * groups
        elif groups == 1 and groups_of < count:  # several ranks have the same one
            start = index * groups_of // count
        return Shard("H", index * heads, heads * count, start, None if start is None else groups_of, "tp", index, count)

    return shard


def _listen_in_process() -> None:
    """An engine in this process steps no more when its last request has finished: who reads its outputs tells."""
    client = getattr(sys.modules.get("vllm.v1.engine.core_client"), "InprocClient", None)
    if client is None or hasattr(client, "_hookattn"):
        return
    own = client.get_output

    @functools.wraps(own)
    def get_output(self: Any) -> Any:
        made = own(self)
        finished = getattr(self.engine_core.scheduler, "finished_req_ids", ())
        for tracer in list(_tracers):
            tracer.finished(finished)
        return made

    client._hookattn, client.get_output = True, get_output
