"""What an operator does on the host, recorded once for each layout of its arguments, and replayed from then on.

To start a kernel, Triton looks at every argument, and before that our launchers choose tiles, allocate results and take views.
That takes longer than a GPU computes for a small batch. But it all follows from the layouts of the operator's arguments (shapes,
strides, dtypes, alignment) and from the numbers among them. So when an operator meets a layout for the second time, it is watched
while it runs: which memory it allocates, which kernels it starts with which arguments, which operators of PyTorch it calls. A
Python function is written that does these things one after the other, and it takes all further calls with that layout:

    t3 = empty((50432, 768), (768, 1), dtype=c0, device=c1)
    c2(a0.data_ptr(), a7.data_ptr(), t3.data_ptr(), None, 50432, 768, ..., stream=stream)
    return t3

A kernel gets addresses, so views that only kernels read are not made. Memory is freed after its last reader, or earlier than the
watched code frees it. The same kernels run with the same arguments, so results are the same to the bit.
"""

from __future__ import annotations

import contextvars
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from crate_kernels import tiles
from crate_kernels.dtypes import float32_precision, is_autocast, no_autocast

# Whether operators on CPU tensors are replayed, too, which Triton's interpreter runs: only in tests.
ON_CPU = False
# Layouts that an operator keeps, 5 to 11 KB each. Beyond that it forgets them all: then layouts hardly come back.
_MOST_LAYOUTS = 1024

_ALLOCATIONS = {f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")}
_UNSAFE_VIEW = "aten::_unsafe_view"  # called as it is: autograd must not take its result for a view


class _Watching(threading.local):
    """The recorder that watches this thread, if one does."""

    recorder: _Recorder | None = None


_watching = _Watching()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """``kernel[grid](*arguments, **options)``, which is noted if an operator is being recorded.

    Args:
        kernel: a ``triton.jit`` function.
        grid: the number of programs along each axis.
        arguments: the kernel's first arguments: tensors, numbers and Nones.
        options: its other arguments, by name, all of them constants; and Triton's own options.
    """
    recorder, _watching.recorder = _watching.recorder, None  # the interpreter calls PyTorch, too
    try:
        compiled = with_scratch(kernel[grid], *arguments, **options)
    finally:
        _watching.recorder = recorder
    if recorder is not None:
        recorder.launched(kernel, grid, arguments, options, compiled)


def with_scratch(run: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Calls ``run``, which launches a kernel, where Triton finds device memory for what the kernel keeps there: its descriptors.

    Triton asks an allocator for it, a context variable. It is set for this call alone: a user may have one of another kind, and
    autograd's threads have none.
    """
    import triton

    def launched() -> Any:
        triton.set_allocator(_scratch)
        return run(*arguments, **options)

    return contextvars.copy_context().run(launched)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """PyTorch's memory begins at multiples of 256 bytes or more, and is reused in the order of the stream."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


class _Replay(NamedTuple):
    """A replay, and whether it calls operators of PyTorch that autocast would change."""

    run: Callable[..., Any]
    under_autocast: bool


class Replayed:
    """A function that is replayed where it knows the layout of its arguments.

    Args:
        function: its arguments are tensors, lists, Nones, and values that can be compared; the first one is a tensor. It returns
            a tensor, or a list or tuple of such. It may call PyTorch and ``launch``, and may read CPU tensors of no dimensions.

    Attributes:
        replays: by layout.
        met: layouts without a replay, and whether they may have one: those met once may, those that cannot be recorded may not.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.replays: dict[tuple, _Replay] = {}
        self.met: dict[tuple, bool] = {}

    def __call__(self, *arguments: Any) -> Any:
        first = arguments[0]
        if not (first.is_cuda or ON_CPU) or tiles.are_on_trial():
            return self.function(*arguments)
        layout = (float32_precision(), *map(_layout, arguments))
        replay = self.replays.get(layout)
        if replay is not None:
            other_device = first.is_cuda and torch.cuda.current_device() != first.get_device()
            if other_device or (replay.under_autocast and is_autocast(first)):
                with no_autocast(first), torch.cuda.device_of(first):
                    return replay.run(*arguments)
            return replay.run(*arguments)
        if layout not in self.met:
            # Tensors without memory cannot be told apart.
            _put(self.met, layout, first.numel() > 0)
        elif self.met[layout] and _are_distinct(arguments):
            return self._record(layout, arguments)
        return self.function(*arguments)

    def _record(self, layout: tuple, arguments: tuple) -> Any:
        recorder = _Recorder(arguments)
        with recorder:
            result = self.function(*arguments)
        replay = recorder.replay(result, self.function)
        if replay is None:
            self.met[layout] = False
        else:
            self.met.pop(layout, None)
            _put(self.replays, layout, replay)
        return result


def _put(known: dict[tuple, Any], layout: tuple, value: object) -> None:
    if len(known) >= _MOST_LAYOUTS:
        known.clear()
    known[layout] = value


def _are_distinct(arguments: tuple) -> bool:
    """Whether no tensor is given twice: a recording could not tell which of the two arguments is read."""
    given = [id(one) for one in _tensors(arguments)]
    return len(set(given)) == len(given)


def _layout(value: Any) -> Any:
    """What decides, of an argument, which kernels run and with which arguments."""
    if isinstance(value, Tensor):
        if value.ndim == 0 and value.device.type == "cpu":
            return value.dtype, value.item()
        return value.shape, value.stride(), value.dtype, value.get_device(), value.data_ptr() % 16
    if isinstance(value, list):
        return tuple(map(_layout, value))
    if isinstance(value, float) and (value == 0 or value != value):
        return repr(value)  # 0.0 equals -0.0, and NaN not even itself
    return type(value), value  # 1 equals True and 1.0


class _Place(NamedTuple):
    """How the replay gets at a tensor: by ``name``, and at its memory ``offset`` bytes behind that of the tensor ``base``."""

    name: str
    base: str
    offset: int


class _Base(NamedTuple):
    """An argument, or a tensor that got memory of its own, and where in memory it was while it was recorded."""

    address: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage_offset: int | torch.SymInt
    dtype: torch.dtype


class _Statement(NamedTuple):
    """A line of the replay, and the names of tensors that it binds and reads.

    needed: it must run even if nobody reads what it binds.
    computes: it is an operator of PyTorch that reads what its arguments hold.
    """

    text: str
    binds: Sequence[str]
    reads: Sequence[str]
    needed: bool = False
    computes: bool = False


class _Recorder(TorchDispatchMode):
    """Notes PyTorch's operators, and the launches that ``launch`` reports, as statements about named tensors."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        super().__init__()
        self._obstacle: str | None = None
        self._statements: list[_Statement] = []
        self._constants: dict[str, Any] = {"empty": torch.empty_strided}
        self._launches_compiled = False
        self._device = arguments[0].device
        self._places: dict[int, _Place] = {}
        self._bases: dict[str, _Base] = {}
        self._unwritten: set[str] = set()  # memory that was allocated only
        self._read_on_host: set[int] = set()  # tensors whose values the layout determines
        self._references: list[weakref.ref] = []  # a tensor that is freed leaves its identity to others
        self._parameters = [f"a{index}" for index in range(len(arguments))]
        for name, value in zip(self._parameters, arguments, strict=True):
            named = [(name, value)] if isinstance(value, Tensor) else []
            if isinstance(value, list):
                named = [(f"{name}[{index}]", one) for index, one in enumerate(value) if isinstance(one, Tensor)]
            for one_name, one in named:
                self._new(one_name, one)
                if one.ndim == 0 and one.device.type == "cpu":
                    self._read_on_host.add(id(one))

    def __enter__(self) -> _Recorder:
        super().__enter__()
        _watching.recorder = self
        return self

    def __exit__(self, *error: Any) -> None:
        _watching.recorder = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _watching.recorder is self and self._obstacle is None:
            self._called(func, args, kwargs or {}, result)
        return result

    def _called(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        given, made = list(_tensors((*args, *kwargs.values()))), list(_tensors(result))
        if unknown := [one for one in given if id(one) not in self._places]:
            self._obstacle = f"{func} reads a tensor {list(unknown[0].shape)} that is no argument"
        elif not made and not all(id(one) in self._read_on_host for one in given):
            self._obstacle = f"{func} reads values on the host"
        elif isinstance(result, (list, tuple)) and any(isinstance(one, (list, tuple)) for one in result):
            self._obstacle = f"{func} returns lists"
        elif torch.Tag.dynamic_output_shape in func.tags:
            self._obstacle = f"the shape of what {func} returns depends on values"
        if self._obstacle or not made:
            return  # a number, which the layout determines
        if func._schema.name in _ALLOCATIONS:
            (one,) = made
            name = self._new(f"t{len(self._references)}", one)
            self._unwritten.add(name)
            kind = f"dtype={self._constant(one.dtype)}, device={self._constant(one.device)}"
            self._add(f"{name} = empty({tuple(one.shape)}, {one.stride()}, {kind})", [name])
            return
        if given and all(id(one) in self._read_on_host for one in given):
            self._read_on_host.update(map(id, made))
        else:
            self._read_on_host.difference_update(map(id, made))  # an argument that was written to
        viewed = [self._viewed(one, given) for one in made]
        unsafe, writes = func._schema.name == _UNSAFE_VIEW, func._schema.is_mutable
        views = [(one, base) for one, base in zip(made, viewed, strict=True) if base is not None]
        same = all(one.dtype == self._bases[base].dtype for one, base in views)
        if len(views) == len(made) and same and not (unsafe or writes):
            for one, base in views:
                self._view(one, base)
            return
        if writes:
            self._unwritten.difference_update(self._place(one).base for one in given)
        reads = [self._place(one).name for one in given]
        binds = [self._bound(one, base) for one, base in zip(made, viewed, strict=True)]
        named = [f"{name}={self._text(value)}" for name, value in kwargs.items()]
        call = f"{self._constant(func)}({', '.join([*map(self._text, args), *named])})"
        if isinstance(result, Tensor):
            target = binds[0]
        else:  # some operators return None for a result that nobody asked for
            names = iter(binds)
            target = "".join(f"{next(names) if isinstance(one, Tensor) else '_'}, " for one in result)
        self._add(f"{target} = {call}", binds, reads, needed=writes, computes=not unsafe)

    def launched(self, kernel: Any, grid: tuple[int, ...], arguments: tuple, options: dict, compiled: Any) -> None:
        """Notes a launch. ``compiled`` is what Triton compiled, or None where its interpreter ran the kernel."""
        if self._obstacle is not None:
            return
        if any(isinstance(one, Tensor) and id(one) not in self._places for one in arguments):
            self._obstacle = f"{kernel.__name__} gets a tensor that is no argument"
            return
        places = [self._place(one) for one in arguments if isinstance(one, Tensor)]
        self._unwritten.difference_update(place.base for place in places)
        if compiled is None:
            text = f"{', '.join(map(self._text, arguments))}, **{self._constant(options)}"
            self._add(f"{self._constant(kernel[grid])}({text})", [], [place.name for place in places], needed=True)
            return
        self._launches_compiled = True
        constants = [self._text(options[name]) for name in kernel.arg_names[len(arguments) :]]
        texts = [self._address(one) if isinstance(one, Tensor) else self._text(one) for one in arguments]
        # As ``compiled[grid]`` does it in Triton 3.6 to 3.9, with no profiler to be told.
        run, function, metadata = map(self._constant, (compiled.run, compiled.function, compiled.packed_metadata))
        how = [*map(str, (*grid, 1, 1)[:3]), "stream", function, metadata, *["None"] * 3]
        given = ", ".join([*how, *texts, *constants])
        needs_scratch = getattr(compiled.metadata, "global_scratch_size", 0)  # AMD's have it since Triton 3.9
        text = f"{self._constant(with_scratch)}({run}, {given})" if needs_scratch else f"{run}({given})"
        self._add(text, [], [place.base for place in places], needed=True)

    def replay(self, result: Any, function: Callable[..., Any]) -> _Replay | None:
        """Does what was noted, and returns what is like ``result``; None if that cannot be written. While a profiler has Triton
        tell it of launches, ``function`` runs instead."""
        if any(id(one) not in self._places for one in _tensors(result)):
            self._obstacle = "it returns a tensor that it did not make"
        elif any(one.numel() and self._place(one).base in self._unwritten for one in _tensors(result)):
            self._obstacle = "it returns memory that nothing noted has written: a kernel was not started by launch"
        if self._obstacle is not None:
            return None
        read, computes = {self._place(one).name for one in _tensors(result)}, False
        lines = [f"return {self._text(result)}"]  # backwards, so that readers come before what they read
        for statement in reversed(self._statements):
            if statement.needed or read.intersection(statement.binds):
                names = dict.fromkeys((*statement.binds, *statement.reads))
                last_read = [name for name in names if name.startswith("t") and name not in read]
                lines += [f"del {', '.join(last_read)}"] if last_read else []
                lines.append(statement.text)
                read.update(statement.reads)
                computes |= statement.computes
        if self._launches_compiled:
            import triton

            self._constants |= {"hooks": triton.knobs.runtime, "is_hooked": _is_hooked, "function": function}
            self._constants["current_stream"] = triton.runtime.driver.active.get_current_stream
            lines.append(f"stream = current_stream({self._device.index or 0})")
            lines.append(f"if is_hooked(hooks): return function({', '.join(self._parameters)})")
        body = "".join(f"    {line}\n" for line in reversed(lines))
        source = f"def replay({', '.join(self._parameters)}):\n{body}"
        exec(compile(source, "<replay>", "exec"), self._constants)
        run = self._constants.pop("replay")
        run.__doc__ = source
        return _Replay(run, computes)

    def _add(self, text: str, binds: Sequence[str], reads: Sequence[str] = (), **kind: bool) -> None:
        self._statements.append(_Statement(text, binds, reads, **kind))

    def _viewed(self, tensor: Tensor, given: Sequence[Tensor]) -> str | None:
        """The base whose memory a result shares, if it shares that of an operand."""
        memory = tensor.untyped_storage().data_ptr()
        return next((self._place(one).base for one in given if one.untyped_storage().data_ptr() == memory), None)

    def _bound(self, tensor: Tensor, base: str | None) -> str:
        """The name of a result; an operand's, if the operator wrote into it and returned it."""
        if id(tensor) in self._places:
            return self._place(tensor).name
        name = f"t{len(self._references)}"
        return self._new(name, tensor) if base is None else self._within(name, tensor, base)

    def _view(self, tensor: Tensor, base: str) -> None:
        """A view of ``base``: made in one step, however many led to it, and only if somebody needs it as a tensor."""
        whole = self._bases[base]
        offset = tensor.storage_offset() - whole.storage_offset
        if (tensor.shape, tensor.stride(), offset) == (whole.shape, whole.stride, 0):
            self._within(base, tensor, base)
        elif id(tensor) not in self._places:
            name = self._within(f"t{len(self._references)}", tensor, base)
            begin = f", {base}.storage_offset() + {offset}" if offset else ""
            self._add(f"{name} = {base}.as_strided({tuple(tensor.shape)}, {tensor.stride()}{begin})", [name], [base])

    def _new(self, name: str, tensor: Tensor) -> str:
        """A tensor with memory of its own, or an argument."""
        offset = tensor.storage_offset()
        self._bases[name] = _Base(tensor.data_ptr(), tensor.shape, tensor.stride(), offset, tensor.dtype)
        return self._within(name, tensor, name)

    def _within(self, name: str, tensor: Tensor, base: str) -> str:
        identity = id(tensor)

        def forget(_: object) -> None:
            self._places.pop(identity, None)
            self._read_on_host.discard(identity)

        self._references.append(weakref.ref(tensor, forget))
        self._places[identity] = _Place(name, base, tensor.data_ptr() - self._bases[base].address)
        return name

    def _place(self, tensor: Tensor) -> _Place:
        return self._places[id(tensor)]

    def _address(self, tensor: Tensor) -> str:
        _, base, offset = self._place(tensor)
        return f"{base}.data_ptr() + {offset}" if offset else f"{base}.data_ptr()"

    def _text(self, value: Any) -> str:
        """A value in the language of the replay."""
        if isinstance(value, Tensor):
            return self._place(value).name
        if isinstance(value, (list, tuple)):
            inside = "".join(f"{self._text(one)}, " for one in value)
            return f"[{inside}]" if isinstance(value, list) else f"({inside})"
        return repr(value) if value is None or isinstance(value, (bool, int, str)) else self._constant(value)

    def _constant(self, value: Any) -> str:
        name = f"c{len(self._constants)}"
        self._constants[name] = value
        return name


def _is_hooked(runtime: Any) -> bool:
    """Whether something, such as Proton, has asked Triton to be told of launches; ``runtime`` is ``triton.knobs.runtime``."""
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, and in lists and tuples of it."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
