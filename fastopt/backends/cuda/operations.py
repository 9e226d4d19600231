"""What device code is made of: exactly rounded arithmetic, bits, loads and stores by address, shuffles.

Numba's plain ``a * b + c`` becomes a fused multiply-add, and an array argument costs microseconds at every launch and
is read 4 bytes at a time. So device code here calls these operations alone, and kernels take addresses. Float32
operations round to nearest and treat subnormals as zero (``.rn.ftz`` in PTX), as the kernels for the CPU do.

Under Numba's simulator (NUMBA_ENABLE_CUDASIM=1) the same names are Python functions, in
`fastopt.backends.cuda.simulated`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.cuda import config

SIMULATED = bool(config.ENABLE_CUDASIM)
"""Whether Numba's simulator runs the kernels."""

if SIMULATED:
    from fastopt.backends.cuda.simulated import *  # noqa: F403  every name, or the other way below
else:
    from llvmlite import ir
    from numba import cuda
    from numba.cuda import cgutils, types
    from numba.cuda.core import sigutils
    from numba.cuda.extending import intrinsic

    f32, f64, i32, i64, u32, u64 = types.float32, types.float64, types.int32, types.int64, types.uint32, types.uint64
    uint32, uint64, int32, int64, float64 = u32, u64, i32, i64, f64
    _FLOAT, _DOUBLE = ir.FloatType(), ir.DoubleType()
    _I8, _I16, _I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)

    def device(signature: str) -> Callable[[Callable], Any]:
        """Compile a Python function for calls in device code; `signature` is ``"result(argument, ...)"``.

        Unlike ``cuda.jit(device=True)`` it needs no GPU to be compiled, and is always pasted into its caller.
        """
        arguments, result = sigutils.normalize_signature(signature)

        def decorate(function: Callable) -> Any:
            def generate(context: Any, builder: Any, made: Any, values: Any) -> Any:
                return context.compile_internal(builder, function, made, values)

            return _intrinsic(result, arguments, generate, function.__name__)

        return decorate

    def _intrinsic(result: Any, arguments: tuple, generate: Callable, name: str) -> Any:
        """An operation of fixed types."""
        names = [f"a{k}" for k in range(len(arguments))]
        scope: dict[str, Any] = {"made": result(*arguments), "generate": generate}
        exec(f"def {name}(context, {', '.join(names)}):\n    return made, generate", scope)
        return intrinsic(scope[name])

    def _instruction(name: str, kind: Any, ir_kind: Any, n: int) -> Any:
        """An LLVM intrinsic of `n` arguments, all of one type."""

        def generate(context: Any, builder: Any, made: Any, values: Any) -> Any:
            wanted = ir.FunctionType(ir_kind, [ir_kind] * n)
            return builder.call(cgutils.get_or_insert_function(builder.module, wanted, name), values)

        return _intrinsic(kind, (kind,) * n, generate, name.replace(".", "_"))

    add = _instruction("llvm.nvvm.add.rn.ftz.f", f32, _FLOAT, 2)
    mul = _instruction("llvm.nvvm.mul.rn.ftz.f", f32, _FLOAT, 2)
    div = _instruction("llvm.nvvm.div.rn.ftz.f", f32, _FLOAT, 2)
    sqrt = _instruction("llvm.nvvm.sqrt.rn.ftz.f", f32, _FLOAT, 1)
    add64 = _instruction("llvm.nvvm.add.rn.d", f64, _DOUBLE, 2)
    mul64 = _instruction("llvm.nvvm.mul.rn.d", f64, _DOUBLE, 2)
    div64 = _instruction("llvm.nvvm.div.rn.d", f64, _DOUBLE, 2)
    sqrt64 = _instruction("llvm.nvvm.sqrt.rn.d", f64, _DOUBLE, 1)

    def _cast(result: Any, argument: Any, change: Callable, name: str) -> Any:
        return _intrinsic(result, (argument,), lambda context, builder, made, values: change(builder, values[0]), name)

    bits = _cast(u32, f32, lambda builder, value: builder.bitcast(value, _I32), "bits")
    from_bits = _cast(f32, u32, lambda builder, value: builder.bitcast(value, _FLOAT), "from_bits")
    widened = _cast(f64, f32, lambda builder, value: builder.fpext(value, _DOUBLE), "widened")
    narrowed = _cast(f32, f64, lambda builder, value: builder.fptrunc(value, _FLOAT), "narrowed")

    def _load(result: Any, ir_kind: Any, n: int, align: int, name: str, widen: bool = False) -> Any:
        """Read `n` neighbours at an address in one access."""

        def generate(context: Any, builder: Any, made: Any, values: Any) -> Any:
            kind = ir.VectorType(ir_kind, n) if n > 1 else ir_kind
            loaded = builder.load(builder.inttoptr(values[0], ir.PointerType(kind, 1)), align=align)
            items = [builder.extract_element(loaded, _I32(k)) for k in range(n)] if n > 1 else [loaded]
            items = [builder.zext(item, _I32) for item in items] if widen else items
            return context.make_tuple(builder, made.return_type, items) if n > 1 else items[0]

        return _intrinsic(types.UniTuple(result, n) if n > 1 else result, (i64,), generate, name)

    def _store(argument: Any, ir_kind: Any, n: int, align: int, name: str, narrow: bool = False) -> Any:
        """Write `n` neighbours at an address in one access."""

        def generate(context: Any, builder: Any, made: Any, values: Any) -> Any:
            items = [builder.trunc(value, ir_kind) for value in values[1:]] if narrow else list(values[1:])
            stored, kind = items[0], ir_kind
            if n > 1:
                kind = ir.VectorType(ir_kind, n)
                stored = ir.Constant(kind, ir.Undefined)
                for k, item in enumerate(items):
                    stored = builder.insert_element(stored, item, _I32(k))
            builder.store(stored, builder.inttoptr(values[0], ir.PointerType(kind, 1)), align=align)
            return context.get_dummy_value()

        return _intrinsic(types.void, (i64, *(argument,) * n), generate, name)

    load_f32 = _load(f32, _FLOAT, 1, 4, "load_f32")
    load_f32x4 = _load(f32, _FLOAT, 4, 16, "load_f32x4")
    load_f64 = _load(f64, _DOUBLE, 1, 8, "load_f64")
    load_i64 = _load(i64, ir.IntType(64), 1, 8, "load_i64")
    load_i32 = _load(i32, _I32, 1, 4, "load_i32")
    load_u32x4 = _load(u32, _I32, 4, 16, "load_u32x4")
    load_u32x2 = _load(u32, _I32, 2, 8, "load_u32x2")
    load_u16 = _load(u32, _I16, 1, 2, "load_u16", widen=True)
    load_u16x4 = _load(u32, _I16, 4, 8, "load_u16x4", widen=True)
    load_u8 = _load(u32, _I8, 1, 1, "load_u8", widen=True)
    store_f32 = _store(f32, _FLOAT, 1, 4, "store_f32")
    store_f32x4 = _store(f32, _FLOAT, 4, 16, "store_f32x4")
    store_f64 = _store(f64, _DOUBLE, 1, 8, "store_f64")
    store_i32 = _store(i32, _I32, 1, 4, "store_i32")
    store_u32x4 = _store(u32, _I32, 4, 16, "store_u32x4")
    store_u16 = _store(u32, _I16, 1, 2, "store_u16", narrow=True)
    store_u16x4 = _store(u32, _I16, 4, 8, "store_u16x4", narrow=True)
    store_u8 = _store(u32, _I8, 1, 1, "store_u8", narrow=True)

    @device("uint32(uint32)")
    def reverse(x):  # bits, the first becomes the last
        return uint32(cuda.brev(x))

    @device("uint32(uint32, int32)")
    def shuffle_u32(x, distance):
        """`x` of the thread whose number in the warp differs by `distance`, an xor; every thread must call."""
        return uint32(cuda.shfl_xor_sync(0xFFFFFFFF, int32(x), distance))

    @device("float64(float64, int32)")
    def shuffle_f64(x, distance):
        return cuda.shfl_xor_sync(0xFFFFFFFF, x, distance)


@device("float32(float32)")
def flush(x):
    """A subnormal becomes zero, with its sign."""
    magnitude = bits(x) & 0x7FFFFFFF
    return from_bits(uint32(bits(x) & 0x80000000)) if magnitude < 0x00800000 else x


@device("float32(float32)")
def neg(x):
    return from_bits(uint32(bits(x) ^ 0x80000000))


@device("float32(float32, float32)")
def sub(x, y):
    return add(x, neg(y))


@device("float32(float32)")
def fabs(x):
    return from_bits(uint32(bits(x) & 0x7FFFFFFF))


@device("float32(float32, float32)")
def copysign(x, y):
    return from_bits(uint32((bits(x) & 0x7FFFFFFF) | (bits(y) & 0x80000000)))


@device("float32(float32)")
def sign(x):
    """-1, 0 or 1; NaN of NaN, and +0 of -0."""
    zero = from_bits(uint32(0))
    one = from_bits(uint32(0x3F800000))
    signed = one if x > zero else (neg(one) if x < zero else zero)
    return x if x != x else signed


@device("float32(float32, float32)")
def maximum(x, y):
    """NaN if one of them is."""
    larger = y if x < y else x
    return y if y != y else larger


@device("float32(float32, float32)")
def minimum(x, y):
    """NaN if one of them is."""
    smaller = y if x > y else x
    return y if y != y else smaller
