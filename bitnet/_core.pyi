"""The C core: tensors, tapes, ops and kernels (csrc/python). Use the names of the package `bitnet` instead.

B batch, T time, S positions of a cache, C channels, H query heads, KV key/value heads, D head dimension, V vocabulary.
dtype is one of "f32", "bf16", "i8", "i32", "ternary2", and "q8" for results of an op; device is "cpu",
"cuda", or "meta" for sizes without values.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, Protocol, Self, final, overload

import numpy as np
from numpy.typing import ArrayLike
from typing_extensions import Buffer, CapsuleType

class ShapeError(ValueError):
    """Tensors whose shapes do not fit an operation."""

_Bytes = Buffer | np.ndarray[Any, Any]  # NumPy's own stubs call an array a Buffer from Python 3.12 on

class _SupportsDLPack(Protocol):
    def __dlpack__(self) -> CapsuleType: ...

class Tensor:
    """Dense row-major numbers on a device."""

    __array_ufunc__: None  # NumPy leaves operators on a Tensor to the Tensor
    def __new__(cls, data: ArrayLike | Tensor, dtype: str | None = None, requires_grad: bool = False) -> Self:
        """data: an array or nested lists (copied; floats become f32, integers i32), or a Tensor (shared)."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def is_leaf(self) -> bool:
        """True unless the tensor was made by a recorded op."""

    @property
    def requires_grad(self) -> bool: ...
    @requires_grad.setter
    def requires_grad(self, value: bool) -> None: ...
    @property
    def grad(self) -> Tensor | None:
        """The accumulated gradient, f32 of the same shape. Can be set to None only."""

    @grad.setter
    def grad(self, value: None) -> None: ...
    def numpy(self, copy: bool = False) -> np.ndarray[Any, Any]:
        """The values as an array: shared with a leaf (writes go through), copied from the result of an op."""

    def item(self) -> float:
        """The value of a one-element tensor as a Python number: an int from i8 and i32."""

    def copy_(self, source: ArrayLike | Tensor, /) -> Self:
        """Copies values of the same shape into this tensor."""

    def detach(self) -> Tensor:
        """The same memory without history."""

    def backward(self, factor: float = 1.0) -> None:
        """Adds factor * d(self)/d(leaf) to the gradient of every leaf that requires one. self: one element."""

    def sum(self) -> Tensor: ...
    def mean(self) -> Tensor: ...
    def softmax(self) -> Tensor: ...
    def transpose(self) -> Tensor:
        """(..., m, n) -> (..., n, m), a copy."""

    @overload
    def reshape(self, *shape: int) -> Tensor: ...
    @overload
    def reshape(self, shape: Sequence[int], /) -> Tensor: ...
    def to(self, dtype: str, /) -> Tensor: ...
    def _repr_html_(self) -> str:
        """Shape, values and their distribution, for a notebook cell."""

    def __add__(self, other: Tensor, /) -> Tensor:
        """Equal shapes, or one of the two a row added to every row of the other."""

    def __radd__(self, other: Tensor, /) -> Tensor: ...
    def __sub__(self, other: Tensor, /) -> Tensor: ...
    def __rsub__(self, other: Tensor, /) -> Tensor: ...
    def __mul__(self, other: Tensor | float, /) -> Tensor: ...
    def __rmul__(self, other: Tensor | float, /) -> Tensor: ...
    def __truediv__(self, other: float, /) -> Tensor: ...
    def __rtruediv__(self, other: Any, /) -> Tensor: ...
    def __matmul__(self, other: Tensor, /) -> Tensor: ...
    def __rmatmul__(self, other: Tensor, /) -> Tensor: ...
    def __neg__(self) -> Tensor: ...
    def __float__(self) -> float: ...
    def __len__(self) -> int: ...
    def __bool__(self) -> NoReturn: ...
    def __getitem__(self, key: Any, /) -> NoReturn: ...
    if sys.version_info >= (3, 12):
        def __buffer__(self, flags: int, /) -> memoryview: ...
        def __release_buffer__(self, buffer: memoryview, /) -> None: ...

    def __dlpack__(
        self, *, stream: Any = None, max_version: Any = None, dl_device: Any = None, copy: bool | None = None
    ) -> CapsuleType: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

@final
class Tape:
    """Records ops so that they can be replayed without Python: same tensors, new values.

    with Tape() as tape:
        loss = model(tokens, targets)
    loss.backward()
    tokens.copy_(next_tokens); tape.replay(); loss.backward()
    """

    def __new__(cls) -> Self: ...
    def __enter__(self) -> Self:
        """Start recording every op of this thread."""

    def __exit__(self, *exception: object) -> None: ...
    def replay(self) -> None:
        """Run every recorded op again, in order, into the same tensors."""

    @property
    def ops(self) -> list[str]:
        """Names of the recorded ops, in order."""

    def __len__(self) -> int: ...

# ---- ops: bitnet/ops.py says what each computes ----

def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """tokens i32 (...), weight (V, C) -> (..., C)."""

def linear(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """x (..., in), weight (out, in) -> (..., out)."""

def bitlinear(x: Tensor, weight: Tensor, residual: Tensor | None = None, activation_bits: int = 8) -> Tensor:
    """x (..., in), latent weight (out, in) -> (..., out); activation_bits 8 or 4."""

def compact_linear(x: Tensor, weight: Tensor, top: int = 0) -> Tensor:
    """x (..., in), compact weight (out, in) -> (..., out)."""

def rmsnorm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5, quantized: bool = False) -> Tensor:
    """x (..., C), weight (C)."""

def hadamard(x: Tensor) -> Tensor:
    """x (..., C)."""

def rope(x: Tensor, cos: Tensor, sin: Tensor, start: Tensor | None = None) -> Tensor:
    """x (B, T, heads, D); cos, sin (positions, D/2); start i32 (B)."""

def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None = None,
    slot: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """q (B, T, H, D); k, v (slots, S, KV, D), scales (slots, S, KV); start, slot i32 (B) -> (B, T, H, D)."""

def cache_append(
    x: Tensor, cache: Tensor, start: Tensor, slot: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """x (B, T, KV, D) into cache (slots, S, KV, D) at start, slot i32 (B); returns the cache."""

def swiglu(gate: Tensor, up: Tensor, quantized: bool = False) -> Tensor: ...
def relu2(gate: Tensor, up: Tensor, quantized: bool = False) -> Tensor: ...
def add(a: Tensor, b: Tensor, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """alpha * a + beta * b; b of a's shape, or a row."""

def mul(a: Tensor, b: Tensor) -> Tensor: ...
def scale(x: Tensor, factor: float) -> Tensor: ...
def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (..., m, k), b (k, n) -> (..., m, n)."""

def sum(x: Tensor) -> Tensor: ...
def mean(x: Tensor) -> Tensor: ...
def reshape(x: Tensor, shape: Sequence[int]) -> Tensor: ...
def transpose(x: Tensor) -> Tensor: ...
def softmax(x: Tensor) -> Tensor: ...
def convert(x: Tensor, dtype: str) -> Tensor: ...
def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, ternary: bool = False) -> Tensor:
    """x (..., C), head weight (V, C), targets i32, one a row of x -> scalar."""

def row_losses(loss: Tensor, /) -> Tensor:
    """The loss of each target, f32 (rows), 0 where it is skipped, of a cross_entropy's result on a tape.

    The op's own memory: a replay writes there again. RuntimeError for any other tensor, and where the op is in a
    segment that is closed.
    """

# ---- making tensors ----

def empty(shape: Sequence[int], dtype: str = "f32", device: str | None = None) -> Tensor:
    """A tensor of zeros, on this thread's device by default."""

def fill_normal(tensor: Tensor, seed: int, stream: int, a: float, b: float) -> None:
    """Fills an f32 leaf: mean a, deviation b; element i is a function of (seed, stream, i)."""

def fill_uniform(tensor: Tensor, seed: int, stream: int, a: float, b: float) -> None:
    """Fills an f32 leaf: uniform in [a, b)."""

def from_dlpack(source: _SupportsDLPack, /) -> Tensor:
    """A tensor over another library's memory (CPU, dense)."""

def rope_tables(positions: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (positions, head_dim / 2)."""

# ---- ternary weights: latent f32 (out, in) ----

def ternary_stats(weight: Tensor, /) -> tuple[int, int, int, int, float]:
    """(minus, zero, plus, flipped, scale); of channel scales, their mean."""

def ternary_scales(weight: Tensor, /) -> Tensor:
    """What the codes are multiplied by, f32: (1,), or (out,) with channel scales."""

def scale_channels(weight: Tensor, /) -> None:
    """Gives an f32 weight a scale for each row (out) from now on. RuntimeError if its codes were made with one."""

def has_channel_scales(weight: Tensor, /) -> bool:
    """Whether each row has a scale of its own."""

def ternary_codes(weight: Tensor, /) -> Tensor:
    """i8 (out, in)."""

def prepare_fifths(
    fifths: bytes | memoryview | np.ndarray[Any, Any],
    rows: int,
    cols: int,
    scale: float | Tensor,
    layout: str = "2",
    /,
) -> Tensor:
    """As prepare_ternary, of codes that come five a byte: row-major, byte j of m = ceil(rows * cols / 5) is the sum
    over k < 5 of 3^k * (code[j + k m] + 1). ShapeError for another number of bytes, ValueError for a byte above 242."""

def compact(weight: Tensor, bits: int, screen: bool, /) -> Tensor:
    """f32 or bf16 (out, in) -> compact: rounded to 8 or 6 bits with a scale for each row. With `screen` it keeps the
    weight, which must be bf16, and compact_linear can tell the largest outputs of that."""

def ternary_layout(weight: Tensor, /) -> str | None:
    """The layout of a prepared weight, None of a latent one."""

def prepare_ternary(codes: Tensor, scale: float | Tensor, layout: str = "2", /) -> Tensor:
    """i8 (out, in) -> prepared: codes times scale, laid out for products alone; a scale f32 (out,) has one for each
    row. ValueError for other bytes, ShapeError for another number of scales."""

def hold_ternary(weights: Sequence[Tensor], /) -> None:
    """Holds the present codes of latent weights: they stay, whatever is written to the weights. Uses them."""

def hold_ternary_codes(weight: Tensor, codes: Tensor, scale: Tensor, /) -> None:
    """The same with codes i8 (out, in) and f32 scales (1,) or (out,) from elsewhere. ValueError for what is no code."""

def use_held_ternary(weights: Sequence[Tensor], held: bool, /) -> None:
    """Whether products and whatever else reads codes find the held ones or those of the present values.

    RuntimeError for held codes that there are not.
    """

def release_ternary(weights: Sequence[Tensor], /) -> None:
    """Lets go of the held codes, if there are any: flips of the next quantization are counted from them."""

def pack_ternary(codes: Tensor, /) -> Tensor:
    """i8 -> ternary2, four codes a byte."""

# ---- what files hold ----

def pack_fifths(codes: Tensor, /) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """i8 (any shape) -> uint8 (ceil(size / 5),): byte j is the codes j, j + m, .. j + 4m, plus 1, in base three."""

def unpack_fifths(source: _Bytes, rows: int, cols: int, /) -> Tensor:
    """Bytes of pack_fifths -> i8 (rows, cols). ValueError names a byte that cannot be of it."""

def rans_encode(source: _Bytes, /) -> bytes:
    """Bytes -> a stream that takes little more than their entropy (csrc/formats/rans.h)."""

def rans_decode(stream: _Bytes, size: int, /) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The `size` bytes that a stream codes. ValueError says what is damaged; nothing outside the stream is read."""

def from_buffer(source: _Bytes, dtype: str, shape: Sequence[int], /) -> Tensor:
    """A tensor over a buffer's memory, which it holds: exactly its elements, aligned; read-only if the buffer is."""

# ---- the optimizer's kernels ----

def flatten(parameters: Iterable[Tensor], /) -> tuple[Tensor, Tensor]:
    """Moves parameters into one buffer, each to a multiple of 16 elements; returns (flat values, flat gradients)."""

def zero_grad(parameters: Iterable[Tensor], /) -> None:
    """Marks the gradients as zero; the next writer overwrites them."""

def settle_grad(parameters: Iterable[Tensor], /) -> None:
    """Clears the memory of gradients that are marked zero."""

def clip_grad_norm(grad: Tensor, max_norm: float, norm: Tensor, factor: Tensor, /) -> None:
    """grad flat; norm and factor (1) are written: factor = min(1, max_norm / (norm + 1e-6)), 1 if max_norm <= 0."""

def adamw(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    factor: Tensor,
    *,
    step: int,
    decay_end: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step over flat tensors of equal size; weight decay holds for the first decay_end elements.

    m and v are both f32 or both bf16; bf16 is rounded at random, as a function of step and place.
    """

# ---- this thread's recording ----

def get_precision() -> str: ...
def set_precision(precision: str, /) -> None: ...
def disable_grad() -> None: ...
def enable_grad() -> None: ...
def is_grad_enabled() -> bool: ...
def open_segment() -> None:
    """Begins a segment on this thread's tape: bitnet.ops.segment says what that is."""

def close_segment() -> None:
    """Ends it, and gives back the memory of its intermediate results."""

# ---- the machine ----

def set_threads(count: int, /) -> None:
    """Threads that kernels use, 0 for the default. Never changes a result."""

def get_threads() -> int: ...
def isa_names() -> list[str]:
    """Instruction sets this CPU can run, weakest first."""

def use_isa(name: str, /) -> None:
    """Never changes a result."""

def current_isa() -> str: ...
def read_bandwidth(size: int, /) -> float:
    """Bytes a second at which all threads together read `size` bytes (2^20 to 2^36) over and over at most, measured
    now: twelve times. Caches count: they serve a model of that size as well."""

def peak(kind: str, /) -> tuple[float, str]:
    """(multiply-adds a second, name of the instructions) at most, of all threads: measured now, in some 12 ms.

    kind: f32, bf16 or int8, by what is multiplied. ValueError for another.
    """

def time_product(
    product: str, ternary: bool, rows: int, in_features: int, out_features: int, repeats: int, /
) -> list[float]:
    """Seconds of each of `repeats` runs of y = x W^T, dx = dy W or dw = dy^T x, nothing else: for benchmarks.

    product: y, dx or dw, in this thread's precision; operands are random, made and quantized before. ValueError for
    sizes below 1.
    """

def cache_copy(cache: Tensor, source: int, destination: int, length: int, /) -> None:
    """The first `length` positions of a slot of a cache, or of its scales, to another slot; on no tape."""

# ---- devices ----

def get_device() -> str:
    """The device on which this thread makes tensors."""

def set_device(name: str | None, /) -> None:
    """Chooses it; bitnet.ops.device does so for a while. ValueError for an unknown one."""

def has_cuda() -> bool: ...
def memory_stats(device: str | None = None, /) -> dict[str, int]:
    """Bytes in_use, cached for reuse, high_water (most in use), and system_calls (blocks taken from the system)."""

def memory_trim(device: str | None = None, /) -> None:
    """Gives cached memory back to the system."""

def memory_restart_peak(device: str | None = None, /) -> None:
    """From now on, high_water is the most in use from now on."""
